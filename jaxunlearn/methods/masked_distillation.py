"""The pretrained model without the forgotten class, learned by short steps that end. Ours: docs/masked-distillation.md.

L = mean KL(t || p) on retain + mean KL(t || p) on forget: p is the model's softmax, t the pretrained model's without
the forgotten class, its other classes scaled to sum to one. Nothing is learned from a label.

BatchNorm is in eval mode throughout: its running statistics are used and never move, its scale and bias learn. In train
mode a batch of one class alone has statistics of its own, under which it is forgotten while the model that is evaluated
still knows it.

Adam is given s (1 + cos(pi n / N)) / 2 times the gradient g in step n of N, from 0, with s = share eps / lr L / |g|^2
of the first step, at most 1. Adam moves a weight by lr / eps times a gradient that is far below its eps, and by no more
than lr. So the first step is `share` times Polyak's step L / |g|^2 (Polyak 1987; Loizou et al. 2021, arXiv:2002.10542)
but for the weights that this would move by lr or more, and the last are nothing; Adam's own steps are of 1e-3 however
small the gradient has become.

For classes.

Differs: nothing, since it is ours.

Values: ours.

Reads: retain images, forget images.
"""

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_scale, tree_vdot

from jaxunlearn.methods.rule import (
    Frozen,
    UnlearningRule,
    accuracy,
    differentiate,
    init_state,
    kl_divergence,
    teach,
    update,
)


def rule(context, *, share: float = 4.0) -> UnlearningRule:
    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=(Frozen(params, batch_stats), jnp.zeros(())))

    def step(params, state, retain, forget):
        teacher, scale = state.extra
        images = jnp.concatenate([retain.images, forget.images])  # in eval mode no image sees another: one forward does
        known = teach(context, teacher, images).at[:, context.forget_class].set(-jnp.inf)
        targets = jnp.split(jax.nn.softmax(known), [len(retain.labels)])

        def loss(student):
            logits = context.apply_eval(student.params, state.batch_stats, images)
            kept, forgotten = jnp.split(logits, [len(retain.labels)])
            distances = kl_divergence(targets[0], kept), kl_divergence(targets[1], forgotten)
            return sum(distances), {"accuracy": accuracy(kept, retain.labels), "forget_loss": distances[1]}

        gradients, state, metrics = differentiate(context, params, state, loss)
        polyak = metrics["loss"] / jnp.maximum(tree_vdot(gradients, gradients), 1e-30)
        first = (share * context.eps / context.learning_rate * polyak).clip(0, 1)  # L may be a rounded 0
        scale = jnp.where(scale > 0, scale, first)
        decay = (1 + jnp.cos(jnp.pi * state.step / (context.epochs * context.steps_per_epoch))) / 2
        params, state = update(context, params, state, tree_scale(scale * decay, gradients))
        return params, state._replace(extra=(teacher, scale)), metrics

    return UnlearningRule(init, step)
