"""`masked_distillation` with its parts as switches, for docs/masked-distillation.md: the defaults are the rule itself.

statistics: of BatchNorm in the student. "eval": the running ones, which stay; "retain": the batch's own, running ones
  move by the retain batch alone; "train": the batch's own, running ones move by both.
scale: "polyak" of the first step, or "adam": none, so that Adam's own steps are taken.
decay: "cosine" to 0, or "none".
target: of retain. "teacher" without the forgotten class, or "labels".
mask: whether the teacher's other classes are the target on forget, or the "uniform" answer over them.
forget_weight: of the forget term.
average: the decay of a running mean of the weights, which the last step takes; 0: none.

Reads: retain, forget images.
"""

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_add_scale, tree_scale, tree_vdot

from jaxunlearn.methods.rule import (
    Frozen,
    UnlearningRule,
    accuracy,
    cross_entropy,
    differentiate,
    init_state,
    kl_divergence,
    teach,
    update,
)


def rule(
    context,
    *,
    share: float = 4.0,
    statistics: str = "eval",
    scale: str = "polyak",
    decay: str = "cosine",
    target: str = "teacher",
    mask: str = "teacher",
    forget_weight: float = 1.0,
    average: float = 0.0,
) -> UnlearningRule:
    def init(params, batch_stats, key):
        teacher = Frozen(params, batch_stats)
        return init_state(context, params, batch_stats, key, extra=(teacher, jnp.zeros(()), params))

    def step(params, state, retain, forget):
        teacher, kept_scale, mean = state.extra

        def known(images):
            return jax.nn.softmax(teach(context, teacher, images).at[:, context.forget_class].set(-jnp.inf))

        def loss(student):
            if statistics == "eval":
                images = jnp.concatenate([retain.images, forget.images])
                logits = context.apply_eval(student.params, state.batch_stats, images)
                kept, forgotten = jnp.split(logits, [len(retain.labels)])
            else:
                kept, moved = student(retain.images), student.batch_stats
                forgotten = student(forget.images)
                student.batch_stats = student.batch_stats if statistics == "train" else moved
            on_retain = cross_entropy(kept, retain.labels)
            if target == "teacher":
                on_retain = kl_divergence(known(retain.images), kept)
            others = known(forget.images)
            if mask == "uniform":
                others = jnp.where(others > 0, 1 / (context.num_classes - 1), 0)
            on_forget = kl_divergence(others, forgotten)
            return on_retain + forget_weight * on_forget, {"accuracy": accuracy(kept, retain.labels)}

        gradients, state, metrics = differentiate(context, params, state, loss)
        first = jnp.ones(())
        if scale == "polyak":
            polyak = metrics["loss"] / jnp.maximum(tree_vdot(gradients, gradients), 1e-30)
            first = (share * context.eps / context.learning_rate * polyak).clip(0, 1)
        kept_scale = jnp.where(state.step == 0, first, kept_scale)
        steps = context.epochs * context.steps_per_epoch
        done = state.step / steps
        factor = kept_scale * ((1 + jnp.cos(jnp.pi * done)) / 2 if decay == "cosine" else 1)
        params, state = update(context, params, state, tree_scale(factor, gradients))
        mean = tree_add_scale(tree_scale(average, mean), 1 - average, params)
        params = jax.tree.map(lambda last, mean: jnp.where(state.step == steps - 1, mean, last), params, mean)
        return params, state._replace(extra=(teacher, kept_scale, mean)), metrics

    return UnlearningRule(init, step)
