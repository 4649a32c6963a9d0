"""Loss-free selective synaptic dampening (Foster et al. 2024, arXiv:2402.19308): `ssd` without labels.

As `ssd`, with I = mean over batches of |gradient of mean ||z||^2|, z the logits of an image, the inner mean over the
batch. No step, so no Adam. For classes and samples.

Differs: its batches are the protocol's, in file order, as those of ssd.

Values: the paper's.

Reads: a pass over all images, a pass over forget images.
"""

import jax.numpy as jnp

from jaxunlearn.methods.rule import UnlearningRule
from jaxunlearn.methods.ssd import dampen_by


def rule(context, *, alpha: float = 10.0, dampening: float = 1.0) -> UnlearningRule:
    return dampen_by(context, lambda logits, labels: (logits**2).sum(-1).mean(), jnp.abs, alpha, dampening)
