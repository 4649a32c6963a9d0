"""SCRUB (Kurmanji et al. 2023, arXiv:2302.09880): away from the teacher on forget, towards it on retain.

With d(x) = T^2 KL(teacher || student) at temperature T: while epoch < `forget_epochs` one Adam step on -d(forget);
then, in every epoch, one Adam step on gamma CE(retain) + alpha d(retain).

Differs: the two directions take turns step by step and share the moments of the protocol's Adam, where the paper's take
turns epoch by epoch, with SGD 5e-4.

Values: the task's.

Reads: retain, forget images.
"""

import jax

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.methods.rule import (
    Frozen,
    UnlearningRule,
    accuracy,
    cross_entropy,
    descend,
    init_state,
    kl_divergence,
    teach,
)

ranges = {"temperature": (1.0, 10.0), "gamma": (0.1, 1.0)}


def rule(
    context, *, temperature: float = 4.0, gamma: float = 0.99, alpha: float = 0.01, forget_epochs: int = 2
) -> UnlearningRule:
    check_positive(temperature=temperature)

    def distance(teacher_logits, logits):
        return temperature**2 * kl_divergence(jax.nn.softmax(teacher_logits / temperature), logits / temperature)

    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=Frozen(params, batch_stats))

    def step(params, state, retain, forget):
        forget_key, retain_key = jax.random.split(state.key)

        def away(params, state):
            target = teach(context, state.extra, forget.images)
            state = state._replace(key=forget_key)
            params, state, _ = descend(
                context, params, state, lambda student: -distance(target, student(forget.images))
            )
            return params, state

        def towards(student):
            logits = student(retain.images)
            target = teach(context, state.extra, retain.images)
            loss = gamma * cross_entropy(logits, retain.labels) + alpha * distance(target, logits)
            return loss, {"accuracy": accuracy(logits, retain.labels)}

        # Epochs belong to all seeds at once, so under vmap this stays a branch: later epochs do not pay for it.
        params, state = jax.lax.cond(state.epoch < forget_epochs, away, lambda *same: same, params, state)
        return descend(context, params, state._replace(key=retain_key), towards)

    return UnlearningRule(init, step)
