"""Catastrophically forgetting the last k layers (Goel et al. 2022, arXiv:2201.06640, CF-k): CE(retain), in which only
the last k layers learn.

A layer is a convolution or linear layer with the BatchNorm behind it. The others are frozen, and so are their running
statistics; while the rest learns, the batch normalises all layers. By default these are the last stage and the head of
ResNet-20 (with shortcut B), the last two blocks and both linear layers of VGG-16-BN, the last two blocks, the last
convolution and the head of MobileNetV2. For any forget set.

Differs: one k for all, where the paper chooses it by validation; frozen layers keep their running statistics, which
published code lets move; and the protocol's Adam in place of SGD.

Values: ours.

Reads: retain.
"""

from functools import partial

import jax

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.ingredients.masks import last_layers
from jaxunlearn.methods.rule import UnlearningRule, descend, init_state, supervised


def rule(context, *, k: int = 8) -> UnlearningRule:
    check_positive(k=k)
    names = context.layers()

    def step(params, state, retain, forget):
        learning = last_layers(names, params, k)

        def loss(student):
            frozen = jax.lax.stop_gradient(student.params)
            student.params = {name: (student.params if name in learning else frozen)[name] for name in frozen}
            return supervised(retain)(student)

        params, after, metrics = descend(context, params, state, loss)
        stats = {name: (after if name in learning else state).batch_stats[name] for name in state.batch_stats}
        return params, after._replace(batch_stats=stats), metrics

    return UnlearningRule(partial(init_state, context), step)
