"""UNSIR (Tarun et al. 2023, arXiv:2111.08947): images N are learned before the first step, which the model takes least
for the forgotten class c: min -CE(f0(N), c) + 0.1 mean ||N||^2. Impair: CE(retain and N together, N labelled c); then
repair: CE(retain). The first `impair` of the steps impairs.

For a whole class, of which no image need be left. N is learned from noise with its own Adam, as published: `rate` 0.1,
25 `steps`, `images` 32, in eval mode.

Differs: half the steps impair and half repair, where the paper has one epoch of each; N is a fifth of every batch that
impairs, a twentieth and less in published code; and the protocol's Adam, in place of Adam 0.02 and 0.01 in the authors'
code and 1e-4 in that of SSD (arXiv:2308.07707).

Values: the published code's (that of SSD); the authors' has 256 images and 40 steps.

Reads: retain.
"""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.methods.rule import UnlearningRule, accuracy, cross_entropy, descend, init_state

ranges = {"images": (8, 64), "steps": (5, 50), "impair": (0.1, 0.9)}


def rule(context, *, images: int = 32, rate: float = 0.1, steps: int = 25, impair: float = 0.5) -> UnlearningRule:
    check_positive(images=images, rate=rate)
    labels, adam = jnp.full(images, context.forget_class, jnp.int32), optax.adam(rate)

    def init(params, batch_stats, key):
        noise = jax.random.normal(key, (images, 32, 32, 3))
        return init_state(context, params, batch_stats, key, extra=noise)

    @jax.jit
    def learned(noise, params, batch_stats):
        def loss(noise):
            logits = context.apply_eval(params, batch_stats, noise)
            return 0.1 * (noise**2).sum((1, 2, 3)).mean() - cross_entropy(logits, labels)

        def learn(_, carry):
            updates, moments = adam.update(jax.grad(loss)(carry[0]), carry[1])
            return optax.apply_updates(carry[0], updates), moments

        return jax.lax.fori_loop(0, steps, learn, (noise, adam.init(noise)))[0]

    def prepare(params, state, retain_set, forget_set):
        return params, state._replace(extra=learned(state.extra, params, state.batch_stats))

    def step(params, state, retain, forget):
        def learn(images, labels):
            def loss(student):
                logits = student(images)
                kept = accuracy(logits[: len(retain.labels)], retain.labels)
                return cross_entropy(logits, labels), {"accuracy": kept}

            return lambda: descend(context, params, state, loss)

        both = jnp.concatenate([retain.images, state.extra]), jnp.concatenate([retain.labels, labels])
        # Steps belong to all seeds at once, so under vmap this stays a branch: one of the two is computed.
        impairs = state.step < impair * context.epochs * context.steps_per_epoch
        return jax.lax.cond(impairs, learn(*both), learn(retain.images, retain.labels))

    return UnlearningRule(init, step, prepare)
