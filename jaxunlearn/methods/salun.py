"""SalUn (Fan et al. 2024, arXiv:2310.12508, section 4): CE(retain) + CE(forget, y'), y' uniform over all classes, drawn
anew in every step; only weights learn in which the loss of the forget set is steepest: the `share` of all parameters
together with the largest |sum over forget of grad CE|, of the pretrained model in eval mode.

For any forget set. A weight outside the mask has a gradient of zero, of which Adam makes no step; BatchNorm's
statistics move in all layers.

Differs: y' may be the true class, as in published code, where the paper excludes it and weighs retain; two forwards in
one step, retain first, where that code has an epoch of forget and one of retain on CIFAR-10, and both in one batch on
CIFAR-100; and the protocol's Adam in place of SGD 0.013 for 10 epochs.

Values: the paper's.

Reads: retain, forget images, a pass over forget.
"""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.errors import UserError
from jaxunlearn.ingredients.gradients import in_eval_mode, zeros
from jaxunlearn.ingredients.labels import random_labels
from jaxunlearn.ingredients.masks import freeze_outside, largest
from jaxunlearn.methods.rule import Pass, UnlearningRule, descend, init_state, relabelled

ranges = {"share": (0.1, 0.9)}


def rule(context, *, share: float = 0.5) -> UnlearningRule:
    if not isinstance(share, jax.Array) and not 0 < share <= 1:  # as one of several, it is not known here
        raise UserError(f"share is {share}: it must be more than 0 and at most 1")

    def init(params, batch_stats, key):
        everything = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
        return init_state(context, params, batch_stats, key, extra=everything)

    def add(params, state, total, batch):
        def loss(logits, labels):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

        return jax.tree.map(jnp.add, total, in_eval_mode(context, params, state, batch, loss))

    def choose(params, state, total):
        return params, state._replace(extra=largest(jax.tree.map(jnp.abs, total), share))

    def step(params, state, retain, forget):
        def loss(student):
            student.params = freeze_outside(student.params, state.extra)
            drawn = random_labels(student.random_key(), forget.labels, context.num_classes)
            return relabelled(student, retain, forget, drawn)

        return descend(context, params, state, loss)

    return UnlearningRule(init, step, passes=(Pass("forget", zeros, add, choose),))
