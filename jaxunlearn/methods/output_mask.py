"""The floor: the forgotten class is never answered, because its bias in the head is minus infinity.

It takes no step and erases nothing: all other weights are the pretrained model's. What a measure says of it, it says of
hiding, not of forgetting.

Differs: nothing, since no paper has it as a rule.

Values: none.

Reads: nothing.
"""

from functools import partial

import jax.numpy as jnp

from jaxunlearn.methods.rule import UnlearningRule, init_state


def rule(context) -> UnlearningRule:
    head = context.layers()[-1]

    def prepare(params, state, retain_set, forget_set):
        bias = params[head]["bias"].at[context.forget_class].set(-jnp.inf)
        return params | {head: params[head] | {"bias": bias}}, state

    return UnlearningRule(partial(init_state, context), None, prepare)
