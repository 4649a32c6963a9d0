"""Ascent on forget, weaker in the tensors that matter for retain. Submitted to the task by deepseek-reasoner.

g = g_r - a m g_f + .1 g_h, the gradients of CE(retain), of CE(forget) and of minus the entropy on forget. Tensor by
tensor m = 1 - sigmoid(10 i), with i = ||g_r|| over the largest ||g_r|| of any tensor. a = .3, .24 where E > 1, .15
where E > 2, with E = .1 CE(retain) + .9 E, the step's own loss included. g is clipped to global norm 5.
Two forwards in train mode, retain first.

Two other readings of what was submitted: `from_zero`, E begins with 0; `each`, i is of each number by itself, |g_r|
over the largest in its tensor.

For classes and samples. Its loss is CE(retain): what it descends is the gradient of no loss.

Differs: E begins with the first step's loss, since how it begins is not published.

Values: the submission's.

Reads: retain, forget.
"""

import jax
import jax.numpy as jnp

from jaxunlearn.ingredients.checks import check_lengths, check_positive
from jaxunlearn.ingredients.gradients import clip, norm
from jaxunlearn.methods.rule import UnlearningRule, differentiate, init_state, supervised, update

ranges = {"memory": (0.5, 0.99)}


def rule(
    context,
    *,
    ascent: tuple = (0.3, 0.24, 0.15),
    limits: tuple = (1.0, 2.0),
    entropy_weight: float = 0.1,
    sharpness: float = 10.0,
    memory: float = 0.9,
    max_norm: float = 5.0,
    from_zero: bool = False,
    each: bool = False,
) -> UnlearningRule:
    check_positive(max_norm=max_norm)
    check_lengths(ascent=(ascent, 3), limits=(limits, 2))

    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=jnp.zeros(()))

    def step(params, state, retain, forget):
        def certainty(student):
            log_p = jax.nn.log_softmax(student(forget.images))
            return (jnp.exp(log_p) * log_p).sum(-1).mean()

        down, state, metrics = differentiate(context, params, state, supervised(retain))
        # Both from one state, so both from one forward: XLA computes what is the same only once.
        spread, _, _ = differentiate(context, params, state, certainty)
        up, state, _ = differentiate(context, params, state, supervised(forget))
        before = jnp.where(state.step == 0, 0.0 if from_zero else metrics["loss"], state.extra)
        mean = memory * before + (1 - memory) * metrics["loss"]
        weight = jnp.where(mean > limits[1], ascent[2], jnp.where(mean > limits[0], ascent[1], ascent[0]))
        norms = jax.tree.map(norm, down)
        longest = jnp.stack(jax.tree.leaves(norms)).max()

        def together(down, up, spread, length):
            size, largest = (jnp.abs(down), jnp.abs(down).max()) if each else (length, longest)
            free = 1 - jax.nn.sigmoid(sharpness * size / jnp.maximum(largest, 1e-30))
            return down - weight * free * up + entropy_weight * spread

        gradients = jax.tree.map(together, down, up, spread, norms)
        params, state = update(context, params, state, clip(gradients, max_norm))
        return params, state._replace(extra=mean), metrics

    return UnlearningRule(init, step)
