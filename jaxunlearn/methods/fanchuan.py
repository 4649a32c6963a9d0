"""Fanchuan, first in the NeurIPS 2023 unlearning challenge: answers on forget that tell nothing.

First phase: KL(U || p) on forget. Then in every step, with f the logits, first -mean log_softmax(f_f f_r^T / 1.15) over
the retain images of the batch, so that none is more alike than another, f_r without a gradient, one forward of forget
and one of retain; then CE(retain).

All forwards are in train mode. For classes and samples. Its loss is what is descended last.

Differs: the first phase is a ninth of all steps, each later step takes one batch of both, the same retain batch twice,
and all share Adam's moments, where it has an epoch of the forget set first and then eight, each a whole one of forget
and a whole one of retain, with three SGD optimizers at 5e-3, 3e-4 (cosine) and 1e-3.

Values: the published code's.

Reads: retain, forget images.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.methods.rule import UnlearningRule, cross_entropy, descend, init_state, kl_divergence

ranges = {"uniform_share": (0.02, 0.5)}


def rule(context, *, uniform_share: float = 0.11, temperature: float = 1.15) -> UnlearningRule:
    check_positive(temperature=temperature)
    uniform_steps = uniform_share * context.epochs * context.steps_per_epoch

    def step(params, state, retain, forget):
        def from_uniform(student):
            logits = student(forget.images)
            return kl_divergence(jnp.full_like(logits, 1 / context.num_classes), logits)

        def contrast(student):
            logits = student(forget.images)
            others = jax.lax.stop_gradient(student(retain.images))
            return -jax.nn.log_softmax(logits @ others.T / temperature).mean()

        def later(params, state):
            params, state, _ = descend(context, params, state, contrast)
            return descend(context, params, state, lambda student: cross_entropy(student(retain.images), retain.labels))

        # Steps belong to all seeds at once, so under vmap this stays a branch.
        first = partial(descend, context, loss=from_uniform)
        return jax.lax.cond(state.step < uniform_steps, first, later, params, state)

    return UnlearningRule(partial(init_state, context), step)
