"""Selective synaptic dampening (Foster et al. 2023, arXiv:2308.07707): weights are made smaller once, nothing learns.

I = mean over batches of (gradient of the batch's CE)^2, for all training images and for those to be forgotten, in eval
mode. Where I_f > alpha I_all a weight becomes min(lambda I_all / I_f, 1) times what it was; `dampening` is lambda.

No step, so no Adam. For classes and samples.

Differs: batches are the protocol's, in file order, which is a random one in the benchmarks' data sets (of batches of
one class each, I_all would be too large).

Values: the paper's.

Reads: a pass over all, a pass over forget.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_scale

from jaxunlearn.ingredients.gradients import in_eval_mode, zeros
from jaxunlearn.methods.rule import Pass, UnlearningRule, cross_entropy, init_state


def dampen_by(context, loss: Callable, measure: Callable, alpha: float, dampening: float) -> UnlearningRule:
    """The rule whose importance is the mean over batches of measure(gradient of loss(logits, labels))."""

    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=jax.tree.map(jnp.zeros_like, params))

    def add(params, state, total, batch):
        gradients = in_eval_mode(context, params, state, batch, loss)
        return jax.tree.map(lambda sum, gradient: sum + measure(gradient), total, gradients)

    def keep(params, state, total):
        return params, state._replace(extra=tree_scale(1 / state.step, total))

    def dampen(params, state, total):
        def dampened(weight, everything, forgotten):
            factor = jnp.minimum(dampening * everything / jnp.where(forgotten > 0, forgotten, 1), 1)
            return jnp.where(forgotten > alpha * everything, weight * factor, weight)

        return jax.tree.map(dampened, params, state.extra, tree_scale(1 / state.step, total)), state

    return UnlearningRule(init, None, passes=(Pass("all", zeros, add, keep), Pass("forget", zeros, add, dampen)))


def rule(context, *, alpha: float = 10.0, dampening: float = 1.0) -> UnlearningRule:
    return dampen_by(context, cross_entropy, jnp.square, alpha, dampening)
