"""Distillation on both sets, the forget gradient damped and projected. Submitted to the task by gpt-5.4(-pro).

g_r: of CE(retain) + T^2 KL(p || t), student first, t the pretrained model's softmax, T = 2.
g_f: of T^2 KL(p' || .25 t' + .75 U') on forget, p', t' and U' being p, t and the uniform answer without the forgotten
class, + mean p_c, its probability (T = 1). `teacher_first` turns both KLs round.
I = .9 I + .1 g_r^2; g_f / (1 + 40 sqrt I); g_f projected off g_r where <g_r, g_f> < 0, over all tensors; then
g = g_r + min(1, (epoch + 1) / 4) min(1, ||g_r|| / ||g_f||) g_f.
Two forwards in train mode, retain first; the pretrained model is in eval mode.

For classes. Its loss is that of retain.

Differs: I begins with the first g_r^2, since how it begins is not published.

Values: the submission's.

Reads: retain, forget images.
"""

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_add_scale

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.ingredients.gradients import norm, without_conflict
from jaxunlearn.methods.rule import (
    Frozen,
    UnlearningRule,
    accuracy,
    cross_entropy,
    differentiate,
    init_state,
    teach,
    update,
)

ranges = {"temperature": (1.0, 8.0), "teacher_share": (0.05, 0.95), "memory": (0.5, 0.99)}


def rule(
    context,
    *,
    teacher_first: bool = False,
    temperature: float = 2.0,
    teacher_share: float = 0.25,
    damping: float = 40.0,
    memory: float = 0.9,
    ramp_epochs: int = 4,
) -> UnlearningRule:
    check_positive(temperature=temperature)

    def distance(log_target, logits):
        pair = jax.nn.log_softmax(logits / temperature), log_target
        answers, targets = pair if teacher_first else pair[::-1]
        return temperature**2 * optax.losses.kl_divergence_with_log_targets(answers, targets).mean()

    def init(params, batch_stats, key):
        importance = jax.tree.map(jnp.zeros_like, params)
        return init_state(context, params, batch_stats, key, extra=(Frozen(params, batch_stats), importance))

    def step(params, state, retain, forget):
        teacher, importance = state.extra

        def on_retain(student):
            logits = student(retain.images)
            target = jax.nn.log_softmax(teach(context, teacher, retain.images) / temperature)
            loss = cross_entropy(logits, retain.labels) + distance(target, logits)
            return loss, {"accuracy": accuracy(logits, retain.labels)}

        def on_forget(student):
            logits = student(forget.images)
            known = jax.nn.softmax(rest(teach(context, teacher, forget.images)) / temperature)
            target = teacher_share * known + (1 - teacher_share) / (context.num_classes - 1)
            return distance(jnp.log(target), rest(logits)) + jax.nn.softmax(logits)[:, context.forget_class].mean()

        def rest(logits):
            return jnp.delete(logits, context.forget_class, axis=1)

        def running(old, gradient):
            return jnp.where(state.step == 0, gradient**2, memory * old + (1 - memory) * gradient**2)

        down, state, metrics = differentiate(context, params, state, on_retain)
        away, state, _ = differentiate(context, params, state, on_forget)
        importance = jax.tree.map(running, importance, down)
        away = jax.tree.map(lambda gradient, i: gradient / (1 + damping * jnp.sqrt(i)), away, importance)
        away = without_conflict(away, down)
        norms = norm(down), norm(away)
        # min(1, a / b) without 0 / 0
        weight = jnp.minimum(1, (state.epoch + 1) / ramp_epochs) * norms[0] / jnp.maximum(jnp.maximum(*norms), 1e-30)
        params, state = update(context, params, state, tree_add_scale(down, weight, away))
        return params, state._replace(extra=(teacher, importance)), metrics

    return UnlearningRule(init, step)
