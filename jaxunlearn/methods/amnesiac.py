"""Amnesiac unlearning, the form that relabels (Graves et al. 2021, arXiv:2010.10981, "unlearning"; as a baseline in
Chundawat et al. 2023, arXiv:2205.08096): CE(retain) + CE(forget, y'), y' one of the classes that are not an image's
own, drawn once an image.

Not the form that subtracts the logged updates of pretraining: there is no log. For any forget set.

Differs: two forwards in one step, retain first, where published code mixes both in one batch, and the protocol's Adam
and steps in place of Adam 1e-4 for 3 epochs.

Values: none.

Reads: retain, forget.
"""

import jax

from jaxunlearn.ingredients.labels import wrong_labels
from jaxunlearn.methods.rule import UnlearningRule, descend, init_state, relabelled


def rule(context) -> UnlearningRule:
    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=jax.random.key_data(key))

    def step(params, state, retain, forget):
        key = jax.random.wrap_key_data(state.extra, impl=jax.random.key_impl(state.key))
        wrong = wrong_labels(key, forget.indices, forget.labels, context.num_classes)
        return descend(context, params, state, lambda student: relabelled(student, retain, forget, wrong))

    return UnlearningRule(init, step)
