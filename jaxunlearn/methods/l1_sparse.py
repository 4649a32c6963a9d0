"""l1-sparse unlearning (Jia et al. 2023, arXiv:2304.04934, "sparsity-aware unlearning"):
CE(retain) + gamma (1 - epoch / epochs) ||theta||_1, over all parameters, those of BatchNorm too.

For any forget set.

Differs: the protocol's Adam in place of SGD 0.01 for 10 epochs, so gamma is no rate at which weights shrink: one whose
gradient is smaller than gamma loses up to 1e-3 a step, whatever gamma is.

Values: ours.

Reads: retain.
"""

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import accuracy, cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget, *, gamma: float = 5e-4):
    logits = student(retain.images)
    norm = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(student.params))
    weight = gamma * (1 - student.state.epoch / student.context.epochs)
    return cross_entropy(logits, retain.labels) + weight * norm, {"accuracy": accuracy(logits, retain.labels)}
