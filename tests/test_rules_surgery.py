"""What the rules compute that put gradients together, or take several steps, by numpy; and their ingredients."""

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
    take_step,
    vector,
)

from jaxunlearn.ingredients.gradients import clip, without_conflict
from jaxunlearn.ingredients.labels import random_labels
from jaxunlearn.methods import fanchuan, gdr_gma, munba
from jaxunlearn.methods.rule import differentiate, init_state

pytestmark = [pytest.mark.usefixtures("in_float64", "quick_compilation"), pytest.mark.numbers]


def batches():
    return linear_batch(6, 0), linear_batch(5, 1, labels=0)


# Ingredients.


def projected(one, two):
    """`one` off `two` where they point away from each other."""
    dot = (one * two).sum()
    return one - min(dot, 0) / (two**2).sum() * two


def test_a_gradient_loses_what_is_against_another_and_nothing_else():
    first, second = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[-2.0, 0.5], [-1.0, 1.0]])
    np.testing.assert_allclose(without_conflict(first, second), projected(first, second))
    np.testing.assert_allclose(np.vdot(without_conflict(first, second), second), 0, atol=1e-12)
    np.testing.assert_array_equal(without_conflict(first, -second), first)
    np.testing.assert_array_equal(without_conflict(first, 0 * second), first)


def test_a_tree_is_one_vector():
    """Tensor by tensor only the second is in conflict; together both lose."""
    first = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0, 0.0])}
    other = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([-3.0, 1.0])}
    whole = without_conflict(first, other)
    flat = projected(np.array([1.0, 1, 2, 0]), np.array([1.0, 0, -3, 1]))
    np.testing.assert_allclose(np.concatenate([whole["a"], whole["b"]]), flat)
    parts = jax.tree.map(without_conflict, first, other)
    np.testing.assert_array_equal(parts["a"], first["a"])
    np.testing.assert_allclose(parts["b"], projected(np.array([2.0, 0]), np.array([-3.0, 1])))


def test_clipping_keeps_the_direction_and_what_is_short():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    np.testing.assert_allclose([clip(tree, 2.5)["a"][0], clip(tree, 2.5)["b"][0, 0]], [1.5, 2])
    assert clip(tree, 6.0)["b"] == 4


def test_a_step_of_several_losses_goes_on_from_each():
    """BatchNorm has seen what the first saw, and the second draws anew."""
    context, batch = linear_context(), batches()[0]
    before = init_state(context, *linear_model(0), jax.random.key(0))
    _, once, _ = differentiate(context, linear_model(0)[0], before, lambda student: student(batch.images).sum())
    _, twice, _ = differentiate(context, linear_model(0)[0], once, lambda student: student(batch.images).sum())
    keys = [jax.random.key_data(state.key).tolist() for state in (before, once, twice)]
    assert keys[0] != keys[1] != keys[2]
    means = [np.asarray(state.batch_stats["bn"]["mean"]) for state in (before, once, twice)]
    np.testing.assert_allclose(means[2] - means[1], 0.5 * (means[1] - means[0]))


# GDR-GMA.


def rectified_and_weighed(model, retain, forget, bank, epoch):
    """(the gradient, the new entry of the bank, which tensors were in conflict, whether the bank was used)."""
    down = gradient(lambda model: cross_entropy(model(retain), retain.labels), model)
    up = gradient(lambda model: -cross_entropy(model(forget), forget.labels), model)
    r, f = (Model(*map(projected, one, two)) for one, two in ((down, up), (up, down)))
    entries = [entry for entry in [*bank, up.bias] if entry @ f.bias < 0] if epoch > 0 else []
    if entries:
        f = f._replace(bias=projected(f.bias, np.mean(entries, 0)))
    weight = 1 / (1 + np.exp(2 * (cross_entropy(model(retain), retain.labels) - 1.5)))
    mixed = Model(*((1 - weight) * one + weight * two for one, two in zip(r, f, strict=True)))
    return mixed, up.bias, [(one * two).sum() < 0 for one, two in zip(down, up, strict=True)], bool(entries)


def test_gdr_gma():
    """In a third step of three an epoch: the bank's place is taken in turn, and read from the second epoch on."""
    retain, forget = batches()
    rule = gdr_gma.rule(linear_context(steps_per_epoch=3), sharpness=2.0, good_loss=1.5)
    step, conflicts, uses = jax.jit(rule.step), set(), set()
    for seed in range(6):
        params, stats = linear_model(seed)
        bank, epoch = np.random.default_rng(seed).normal(size=(3, CLASSES)), seed % 2
        state = rule.init(params, stats, jax.random.key(0))
        assert state.extra.shape == bank.shape and not state.extra.any()
        changes = {"step": jnp.int32(3 * epoch + 1), "epoch": jnp.int32(epoch), "extra": jnp.asarray(bank)}
        taken, after, metrics = take_step(step, params, state, retain, forget, **changes)
        expected, entry, met, used = rectified_and_weighed(in_numpy(params), retain, forget, bank[[0, 2]], epoch)
        assert_same(taken, expected)
        np.testing.assert_allclose(after.extra, [bank[0], entry, bank[2]], atol=1e-8)
        np.testing.assert_allclose(after.batch_stats["bn"]["mean"], moved(state.batch_stats, retain, forget))
        np.testing.assert_allclose(metrics["loss"], cross_entropy(in_numpy(params)(retain), retain.labels))
        conflicts |= {*met}
        uses.add((epoch, used))
    assert conflicts == {True, False} and {(0, False), (1, True)} <= uses


# MUNBa.


def test_a_bargain_is_the_nash_solution():
    """With G the two gradients, G^T G a = 1 / a."""
    r, f = np.random.default_rng(0).normal(size=(2, 5))
    for other in (f, -f, 100 * f):
        weights = np.array(munba.bargain(jnp.asarray(r), jnp.asarray(other), (1.0, 0.1)))
        pair = np.stack([r, other])
        np.testing.assert_allclose(pair @ pair.T @ weights, 1 / weights)
        np.testing.assert_allclose(np.linalg.norm(weights @ pair), np.sqrt(2))


def test_a_bargain_of_the_orthogonal_and_none_of_the_opposite():
    r, f = jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0])
    np.testing.assert_allclose(munba.bargain(r, f, (1.0, 0.1)), [0.5, 0.25])
    for without in (-3 * r, 0 * r):
        assert [float(weight) for weight in munba.bargain(r, without, (1.0, 0.1))] == [1.0, 0.1]


def test_munba():
    retain, forget = batches()
    params, stats = linear_model(1)
    rule, model = munba.rule(linear_context()), in_numpy(params)
    state = rule.init(params, stats, jax.random.key(0))
    taken, after, metrics = take_step(jax.jit(rule.step), params, state, retain, forget)
    key = jax.random.split(state.key)[0]  # once the retain forward has drawn
    labels = random_labels(jax.random.split(key)[1], forget.labels, CLASSES)
    down = vector(gradient(lambda model: cross_entropy(model(retain), retain.labels), model))
    away = vector(gradient(lambda model: cross_entropy(model(forget), labels), model))
    bisector = down / np.linalg.norm(down) + away / np.linalg.norm(away)
    np.testing.assert_allclose(vector(taken), bisector / np.linalg.norm(bisector), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(metrics["loss"], cross_entropy(model(retain), retain.labels))
    assert (after.batch_stats["bn"]["mean"] != stats["bn"]["mean"]).all()


# Fanchuan.


def minus(model, gradients):
    return Model(*(array - step for array, step in zip(model, gradients, strict=True)))


def test_fanchuan():
    """Of eight steps the first goes towards the uniform answer; the others are two updates each."""
    retain, forget = batches()
    params, stats = linear_model(1)
    rule, model = fanchuan.rule(linear_context(steps_per_epoch=2)), in_numpy(params)
    state, step = rule.init(params, stats, jax.random.key(0)), jax.jit(rule.step)

    def from_uniform(model):
        return (-np.log(CLASSES) - log_softmax(model(forget))).mean()

    taken, _, metrics = take_step(step, params, state, retain, forget)
    assert_same(taken, gradient(from_uniform, model))
    np.testing.assert_allclose(metrics["loss"], from_uniform(model))

    others = model(retain)  # without a gradient
    apart = minus(model, gradient(lambda model: -log_softmax(model(forget) @ others.T / 1.15).mean(), model))
    end = minus(apart, gradient(lambda model: cross_entropy(model(retain), retain.labels), apart))
    taken, after, metrics = take_step(step, params, state, retain, forget, step=jnp.int32(1))
    assert_same(taken, minus(model, end))
    np.testing.assert_allclose(after.batch_stats["bn"]["mean"], moved(state.batch_stats, forget, retain, retain))
    np.testing.assert_allclose(metrics["loss"], cross_entropy(apart(retain), retain.labels))
