"""Influence unlearning (Izzo et al. 2021, arXiv:2002.10077, as in Jia et al. 2023, arXiv:2304.04934): one change, once.

The weights w become w + alpha H^(-1) v, v = n_f / n (g_f - g_r): g_f and g_r are the mean gradients of the CE of forget
and retain, n_f and n how many images are in forget and in all. H^(-1) v is WoodFisher's recursion (Singh & Alistarh
2020, arXiv:2004.14340) over N = `images` images of retain, one at a time, of gradient g:

  k <- k - (k . g) / (N + o . g) o,   o <- o - (o . g) / (N + o . g) o,   from k = v and, behind the first image, o = g.

All in eval mode. No step, so no Adam. For classes and samples.

Differs: as in that code, unlike in the paper of WoodFisher, o is only ever the first image's gradient, scaled, so k
leaves v along it alone and the rule is mostly one long step of gradient ascent (the o of every image, which H^(-1)
would need, are as many models). Nothing keeps N + o . g above 0: a first image whose gradient is against many others'
makes o grow without bound. The images of the recursion are drawn, where the code takes the first, and N stays `images`
where retain has fewer.

Values: the published code's for `images`, ours for alpha: on the digits 1 forgets nothing, where that code has .2, and
10 costs half of retain.

Reads: a pass over forget, a pass over retain.
"""

from functools import partial

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_add_scale, tree_scale, tree_sub, tree_vdot

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.ingredients.gradients import in_eval_mode, zeros
from jaxunlearn.methods.rule import Pass, UnlearningRule, cross_entropy, init_state

ranges = {"images": (500, 2000)}


def rule(context, *, alpha: float = 3.0, images: int = 1000) -> UnlearningRule:
    check_positive(images=images)

    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=start(params, None))

    def start(params, state):
        return zeros(params, state), jnp.zeros(())

    def add(params, state, carry, batch):
        total, count = carry
        size = len(batch.labels)
        g = in_eval_mode(context, params, state, batch, cross_entropy)
        return tree_add_scale(total, size, g), count + size

    def keep(params, state, carry):
        return params, state._replace(extra=carry)

    def compare(params, state, carry):
        (forget, n_f), (retain, n_r) = state.extra, carry
        difference = tree_sub(tree_scale(1 / n_f, forget), tree_scale(1 / n_r, retain))
        return params, state._replace(extra=(tree_scale(n_f / (n_f + n_r), difference), n_f))

    def invert(params, state, carry, batch):
        k, o = carry
        g = in_eval_mode(context, params, state, batch, cross_entropy)
        first = state.step == 0
        length = images + tree_vdot(o, g)
        k = tree_add_scale(k, -tree_vdot(k, g) / length, o)  # o is 0 at the first image
        shortened = tree_scale(1 - tree_vdot(o, g) / length, o)
        return k, jax.tree.map(partial(jnp.where, first), g, shortened)

    def go(params, state, carry):
        return tree_add_scale(params, alpha, carry[0]), state

    return UnlearningRule(
        init,
        None,
        passes=(
            Pass("forget", start, add, keep),
            Pass("retain", start, add, compare),
            Pass("retain", lambda params, state: (state.extra[0], zeros(params, state)), invert, go, images, 1),
        ),
    )
