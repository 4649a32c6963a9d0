"""GDR-GMA (Lin et al. 2024, ACM Multimedia): descent on retain and ascent on forget, rectified and weighed.

g_r is the gradient of CE(retain), g_f of -CE(forget). Tensor by tensor, where <g_r, g_f> < 0 each loses its part along
the other. From the second epoch g_f of the last tensor, the head's bias, is projected in the same way off the mean of
those of the last epoch's g_f (this step's included, none projected) that point away from it: a memory bank.
g = (1 - l) g_r + l g_f, l = sigmoid(-100 (CE(retain) - .02)). Two forwards in train mode, retain first.

For classes and samples. Its loss is CE(retain).

Differs: both gradients are projected as they were and the bank is only read, where the published code projects g_f off
g_r as already projected and adds to the bank as it averages, and the protocol's Adam stands for AdamW at 1e-4.

Values: the published code's.

Reads: retain, forget.
"""

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_scale

from jaxunlearn.ingredients.gradients import without_conflict
from jaxunlearn.methods.rule import UnlearningRule, differentiate, init_state, supervised, update


def rule(context, *, sharpness: float = 100.0, good_loss: float = 0.02) -> UnlearningRule:
    head = context.layers()[-1]

    def init(params, batch_stats, key):
        bias = params[head]["bias"]
        bank = jnp.zeros((context.steps_per_epoch, *bias.shape), bias.dtype)
        return init_state(context, params, batch_stats, key, extra=bank)

    def step(params, state, retain, forget):
        down, state, metrics = differentiate(context, params, state, supervised(retain))
        slope, state, _ = differentiate(context, params, state, supervised(forget))
        up = tree_scale(-1, slope)
        bank = state.extra.at[state.step % context.steps_per_epoch].set(up[head]["bias"])
        down, up = jax.tree.map(without_conflict, down, up), jax.tree.map(without_conflict, up, down)
        bias = up[head]["bias"]
        against = (bank @ bias < 0) & (state.epoch > 0)
        mean = jnp.where(against[:, None], bank, 0).sum(0) / jnp.maximum(against.sum(), 1)
        up = up | {head: up[head] | {"bias": without_conflict(bias, mean)}}
        weight = jax.nn.sigmoid(sharpness * (good_loss - metrics["loss"]))
        gradients = jax.tree.map(lambda r, f: (1 - weight) * r + weight * f, down, up)
        params, state = update(context, params, state, gradients)
        return params, state._replace(extra=bank), metrics

    return UnlearningRule(init, step)
