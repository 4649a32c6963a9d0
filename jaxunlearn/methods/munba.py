"""A bargain of keeping and forgetting (Wu et al. 2024, arXiv:2411.15537, the closed form for two players).

g = a_r g_r + a_f g_f, with g_r of CE(retain) and g_f of CE(forget) with random labels, drawn anew in each step, of any
class. The Nash solution is the bisector at length sqrt 2: a = 1 / (||g|| sqrt(1 + cos(g_r, g_f))) for each of the two.
Where they are opposite, or one is 0, there is no bargain and g = g_r + .1 g_f. g is clipped to global norm 1. Two
forwards in train mode, retain first.

For classes and samples. Its loss is CE(retain).

Differs: a is the published form without its 0 / 0 where the two are orthogonal, and the protocol's Adam, which sees
only the direction of g and not its length, stands for SGD.

Values: the published code's.

Reads: retain, forget images.
"""

from functools import partial

import jax.numpy as jnp
from optax.tree_utils import tree_add_scale, tree_scale, tree_vdot

from jaxunlearn.ingredients.checks import check_lengths, check_positive
from jaxunlearn.ingredients.gradients import clip, norm
from jaxunlearn.ingredients.labels import random_labels
from jaxunlearn.methods.rule import UnlearningRule, cross_entropy, differentiate, init_state, supervised, update


def bargain(retain, forget, fallback):
    """The weights (a_r, a_f) of two gradients: scalars."""
    lengths = norm(retain), norm(forget)
    product = lengths[0] * lengths[1]
    agreement = product + tree_vdot(retain, forget)  # product * (1 + cos)
    possible = agreement > 1e-6 * product  # less is rounding
    return [
        jnp.where(possible, jnp.sqrt(product / agreement) / own, f) for own, f in zip(lengths, fallback, strict=True)
    ]


def rule(context, *, fallback: tuple = (1.0, 0.1), max_norm: float = 1.0) -> UnlearningRule:
    check_positive(max_norm=max_norm)
    check_lengths(fallback=(fallback, 2))

    def step(params, state, retain, forget):
        def on_forget(student):
            labels = random_labels(student.random_key(), forget.labels, context.num_classes)
            return cross_entropy(student(forget.images), labels)

        down, state, metrics = differentiate(context, params, state, supervised(retain))
        away, state, _ = differentiate(context, params, state, on_forget)
        weights = bargain(down, away, fallback)
        gradients = tree_add_scale(tree_scale(weights[0], down), weights[1], away)
        return *update(context, params, state, clip(gradients, max_norm)), metrics

    return UnlearningRule(partial(init_state, context), step)
