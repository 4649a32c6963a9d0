"""What the rules compute that others submitted to the task, by numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import (
    CLASSES,
    Model,
    assert_same,
    cross_entropy,
    gradient,
    in_numpy,
    linear_batch,
    linear_context,
    linear_model,
    log_softmax,
    moved,
    softmax,
    take_step,
    vector,
)
from tiny import assert_close

from jaxunlearn.methods import adaptive_uniform, fisher_pcgrad, importance_masked, zeroed_logit

pytestmark = [pytest.mark.usefixtures("in_float64", "quick_compilation"), pytest.mark.numbers]
TEACHER, STUDENT = 0, 1


@functools.cache
def made(rule, **hyperparameters):
    """(the jitted step, the student's params, the state that began with the teacher, retain, forget)."""
    rule = rule(linear_context(), **hyperparameters)
    state = rule.init(*linear_model(TEACHER), jax.random.key(0))
    return jax.jit(rule.step), linear_model(STUDENT)[0], state, linear_batch(6, 0), linear_batch(5, 1, labels=0)


def clipped(gradients, norm=5.0):
    length = np.linalg.norm(vector(gradients))
    return Model(*(array * min(1, norm / length) for array in gradients)), length


@pytest.mark.parametrize("max_norm", [5.0, 0.1])
def test_adaptive_uniform(max_norm):
    step, params, state, retain, forget = made(adaptive_uniform.rule, max_norm=max_norm)
    stats = state.batch_stats["bn"]["mean"]
    still = in_numpy(params).in_eval_mode(forget, stats)
    weights = np.maximum(1, 1 + 2 * softmax(still)[:, 0])  # without a gradient

    def loss(model):
        logits = model.in_eval_mode(forget, stats)
        from_uniform = (-np.log(CLASSES) - log_softmax(logits)).mean(-1)
        kept = cross_entropy(model.in_eval_mode(retain, stats), retain.labels)
        return kept + 0.2 * (weights * from_uniform).mean() + 0.03 * (logits**2).mean()

    taken, after, metrics = take_step(step, params, state, retain, forget)
    expected, length = clipped(gradient(loss, in_numpy(params)), max_norm)
    assert (length > max_norm) == (max_norm < 1)
    assert_same(taken, expected)
    np.testing.assert_allclose(metrics["loss"], loss(in_numpy(params)), rtol=1e-9)
    np.testing.assert_array_equal(after.batch_stats["bn"]["mean"], stats)


def test_zeroed_logit():
    step, params, state, retain, forget = made(zeroed_logit.rule)
    stats = state.batch_stats["bn"]["mean"]

    def loss(model):
        errors = []
        for batch in (retain, forget):
            target = in_numpy(linear_model(TEACHER)[0]).in_eval_mode(batch, stats)
            target[:, 0] = 0
            errors.append(((model(batch) - target) ** 2).mean())
        return 5 * errors[0] + errors[1]

    taken, after, metrics = take_step(step, params, state, retain, forget)
    assert_same(taken, gradient(loss, in_numpy(params)))
    np.testing.assert_allclose(metrics["loss"], loss(in_numpy(params)), rtol=1e-9)
    np.testing.assert_allclose(after.batch_stats["bn"]["mean"], moved(state.batch_stats, retain, forget))


def masked_gradient(model, retain, forget, ascent, each=False):
    down = gradient(lambda model: cross_entropy(model(retain), retain.labels), model)
    up = gradient(lambda model: cross_entropy(model(forget), forget.labels), model)
    spread = gradient(lambda model: (softmax(model(forget)) * log_softmax(model(forget))).sum(-1).mean(), model)
    norms = np.array([np.linalg.norm(array) for array in down])
    importance = [np.abs(x) / np.abs(x).max() for x in down] if each else norms / norms.max()
    free = [1 - 1 / (1 + np.exp(-10 * i)) for i in importance]
    assert np.any(free[0] != free[1])
    return Model(*(r - ascent * m * f + 0.1 * h for r, m, f, h in zip(down, free, up, spread, strict=True)))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("number", "scale", "before", "ascent", "from_zero"),
    [
        (0, 0.3, 9, 0.3, False),
        (0, 1, 9, 0.24, False),
        (0, 5, 0, 0.15, False),
        (7, 0.3, 9, 0.15, False),
        (7, 5, 0, 0.3, False),
        (7, 5, 0.8, 0.24, False),
        (0, 5, 9, 0.3, True),
        (7, 5, 0.8, 0.24, True),
    ],
)
def test_importance_masked(number, scale, before, ascent, from_zero, each):
    """The running mean begins with the first step's loss, or zero, whatever stands there, and decides the ascent."""
    step, _, state, retain, forget = made(importance_masked.rule, from_zero=from_zero, each=each)
    params = jax.tree.map(lambda x: scale * x, linear_model(TEACHER)[0])
    model = in_numpy(params)
    taken, after, metrics = take_step(
        step, params, state, retain, forget, step=jnp.int32(number), extra=jnp.asarray(float(before))
    )
    loss = cross_entropy(model(retain), retain.labels)
    if number == 0:
        before = 0 if from_zero else loss
    np.testing.assert_allclose(after.extra, 0.1 * loss + 0.9 * before)
    assert_same(taken, clipped(masked_gradient(model, retain, forget, ascent, each))[0])
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(after.batch_stats["bn"]["mean"], moved(state.batch_stats, retain, forget))


def test_importance_masked_is_clipped():
    step, params, state, retain, forget = made(importance_masked.rule, max_norm=0.1)
    taken, *_ = take_step(step, params, state, retain, forget)
    np.testing.assert_allclose(np.linalg.norm(vector(taken)), 0.1)


def pcgrad(model, retain, forget, stats, importance, step, epoch, damping, teacher_first):
    teacher = in_numpy(linear_model(TEACHER)[0])

    def distance(log_t, logits):
        pair = (log_t, log_softmax(logits / 2)) if teacher_first else (log_softmax(logits / 2), log_t)
        return 4 * (np.exp(pair[0]) * (pair[0] - pair[1])).sum(-1).mean()

    def on_retain(model):
        target = log_softmax(teacher.in_eval_mode(retain, stats) / 2)
        return cross_entropy(model(retain), retain.labels) + distance(target, model(retain))

    def on_forget(model):
        target = 0.25 * softmax(teacher.in_eval_mode(forget, stats)[:, 1:] / 2) + 0.75 / (CLASSES - 1)
        return distance(np.log(target), model(forget)[:, 1:]) + softmax(model(forget))[:, 0].mean()

    down, away = gradient(on_retain, model), gradient(on_forget, model)
    importance = [r**2 if step == 0 else 0.9 * i + 0.1 * r**2 for i, r in zip(importance, down, strict=True)]
    away = Model(*(f / (1 + damping * np.sqrt(i)) for f, i in zip(away, importance, strict=True)))
    r, f = vector(down), vector(away)
    conflict = r @ f < 0
    if conflict:
        away = Model(*(two - r @ f / (r @ r) * one for one, two in zip(down, away, strict=True)))
    weight = min(1, (epoch + 1) / 4) * min(1, np.linalg.norm(r) / np.linalg.norm(vector(away)))
    mixed = Model(*(one + weight * two for one, two in zip(down, away, strict=True)))
    return mixed, on_retain(model), conflict, Model(*importance)


@pytest.mark.parametrize("teacher_first", [False, True])
@pytest.mark.parametrize(("number", "epoch", "damping"), [(0, 0, 40.0), (5, 2, 40.0), (40, 17, 0.0)])
def test_fisher_pcgrad(teacher_first, number, epoch, damping):
    step, _, state, retain, forget = made(fisher_pcgrad.rule, teacher_first=teacher_first, damping=damping)
    stats, before = state.batch_stats["bn"]["mean"], jax.tree.map(lambda x: 1e-4 * x**2, linear_model(3)[0])
    conflicts = set()
    for scale in (1, -1, 0.3, 3):  # students whose two gradients point away from each other, and others
        params = jax.tree.map(lambda x, scale=scale: scale * x, linear_model(3)[0])
        changes = {"step": jnp.int32(number), "epoch": jnp.int32(epoch), "extra": (state.extra[0], before)}
        taken, after, metrics = take_step(step, params, state, retain, forget, **changes)
        expected, loss, conflict, running = pcgrad(
            in_numpy(params), retain, forget, stats, in_numpy(before), number, epoch, damping, teacher_first
        )
        conflicts.add(bool(conflict))
        assert_close(after.extra[0], state.extra[0], 0)  # the teacher
        assert_same(in_numpy(after.extra[1]), running)
        assert_same(taken, expected)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
        np.testing.assert_allclose(after.batch_stats["bn"]["mean"], moved(state.batch_stats, retain, forget))
    assert conflicts == {True, False} or damping == 0
