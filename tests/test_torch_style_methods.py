"""Unlearning methods of others as classes: each has what defines it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_torch_style import FORGET, RETAIN, context, direct_gradients, first_gradients, start
from tiny import assert_close, make_batch

from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.registry import get_method
from jaxunlearn.training.checking import check_rule

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]
FOLDER = Path(__file__).parent / "torch_style_methods"
NAMES = sorted(file.stem.removeprefix("torch_") for file in FOLDER.glob("*.py"))
MORE = make_batch(5, seed=2, labels=0)  # a second batch to forget


def method(name):
    return get_method(str(FOLDER / f"torch_{name}.py"))


def prepared(name, retain=(RETAIN,), forget=(FORGET,), **settings):
    """(rule, params and state before, params and state after `prepare`, which is pure)."""
    rule, params, state = start(method(name).factory, **settings)
    return rule, (params, state), jax.jit(rule.prepare)(params, state, list(retain), list(forget))


def eval_gradients(params, state, batch):
    """Of the cross-entropy in eval mode, as a list of numpy arrays."""

    def loss(params):
        return cross_entropy(context().apply_eval(params, state.batch_stats, batch.images), batch.labels)

    return [np.asarray(g, np.float64) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]


def train_loss(params, state, images, labels):
    logits, _ = jax.jit(context().apply_train)(params, state.batch_stats, images, jax.random.key(0))
    return cross_entropy(logits, labels)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_keeps_the_contract(name):
    check_rule(method(name), method(name).factory(context()), context(), [(9, 5)])


def test_salun_moves_the_half_of_the_weights_in_which_forgetting_is_steepest():
    rule, (params, state), (same, after) = prepared("salun", forget=(FORGET, MORE))
    assert_close(same, params, 0)
    slopes = [abs(a + b) for a, b in zip(*(eval_gradients(params, state, b) for b in (FORGET, MORE)), strict=True)]
    least = np.median(np.concatenate([slope.ravel() for slope in slopes]))
    masks = after.extra["mask"]  # in the order of the leaves of the parameters
    for slope, mask in zip(slopes, masks, strict=True):
        clear = abs(slope - least) > 1e-5 * least
        np.testing.assert_array_equal(mask[clear], (slope > least)[clear])
    assert abs(sum(mask.sum() for mask in masks) - sum(mask.size for mask in masks) / 2) <= 1
    moved, _, _ = jax.jit(rule.step)(params, after, RETAIN, FORGET)
    for mask, old, new in zip(masks, *map(jax.tree.leaves, (params, moved)), strict=True):
        np.testing.assert_array_equal(old != new, mask == 1)


def test_gdr_gma_leaves_out_what_points_against_the_other_gradient():
    rule, params, state = start(method("gdr_gma").factory, sharpness=1.0, good=1.0)

    def expected(params, state, mean=None):
        down, up = (
            direct_gradients(params, state.batch_stats, RETAIN),
            direct_gradients(params, state.batch_stats, FORGET),
        )
        weight = 1 / (1 + np.exp(train_loss(params, state, *RETAIN) - 1.0))
        conflicts, mixed = 0, {}
        for layer, leaf in [(layer, leaf) for layer, leaves in down.items() for leaf in leaves]:
            d, u = np.asarray(down[layer][leaf], np.float64), -np.asarray(up[layer][leaf], np.float64)
            other = d if mean is None or layer != "linear" else np.asarray(mean[layer][leaf], np.float64)
            conflicts += (d * u).sum() < 0
            descent = d - min((d * u).sum(), 0) / (u * u).sum() * u
            ascent = u - min((u * other).sum(), 0) / (other * other).sum() * other
            mixed.setdefault(layer, {})[leaf] = np.float32((1 - weight) * descent + weight * ascent)
        assert conflicts
        return down, mixed

    step, (down, mixed) = jax.jit(rule.step), expected(params, state)
    params, state, _ = step(params, state, RETAIN, FORGET)
    assert_close(first_gradients(state), mixed, 1e-4)
    first = first_gradients(state)
    _, second = expected(params, state, mean=down)  # from the second epoch the head's are compared with the mean
    _, state, _ = step(params, state._replace(epoch=jnp.int32(1)), RETAIN, FORGET)
    decay = 0.9  # Adam's of its first moment
    assert_close(first_gradients(state), jax.tree.map(lambda a, b: decay * a + b, first, second), 1e-4)


def test_unsir_learns_images_that_the_model_does_not_take_for_the_class_and_then_unlearns_on_them():
    rule, (params, before), (same, after) = prepared("unsir", images=4, steps=2)
    assert_close(same, params, 0)
    noise, labels = before.extra["noise"][0], jnp.zeros(4, jnp.int32)

    @jax.jit
    def loss(noise):
        logits = context().apply_eval(params, before.batch_stats, noise)
        return 0.1 * (noise**2).sum((1, 2, 3)).mean() - cross_entropy(logits, labels)

    adam = optax.adam(0.1)
    moments, first = adam.init(noise), loss(noise)
    for _ in range(2):
        updates, moments = adam.update(jax.grad(loss)(noise), moments)
        noise = optax.apply_updates(noise, updates)
    assert_close(after.extra["noise"][0], noise, 1e-3)
    assert loss(noise) < first
    impaired = jnp.concatenate([RETAIN.images, after.extra["noise"][0]]), jnp.concatenate([RETAIN.labels, labels])
    step = jax.jit(rule.step)
    for epoch, batch in enumerate((impaired, RETAIN)):
        *_, metrics = step(params, after._replace(epoch=jnp.int32(epoch)), RETAIN, FORGET)
        np.testing.assert_allclose(metrics["loss"], train_loss(params, after, *batch), rtol=1e-5)


def test_ssd_dampens_the_weights_that_matter_for_the_forgotten_class():
    rule, (params, state), (dampened, after) = prepared("ssd", alpha=1.5, dampening=1.75)
    retain, forget = (eval_gradients(params, state, batch) for batch in (RETAIN, FORGET))
    changed = []
    for r, f, old, new in zip(retain, forget, *map(jax.tree.leaves, (params, dampened)), strict=True):
        everything, forgotten = ((r + f) / 2) ** 2, np.maximum(f**2, 1e-30)
        clear = abs(forgotten - 1.5 * everything) > 1e-4 * forgotten
        factor = np.where(forgotten > 1.5 * everything, np.minimum(1.75 * everything / forgotten, 1), 1)
        np.testing.assert_allclose(new[clear], (factor * old)[clear], rtol=1e-3, atol=1e-7)
        changed.append((old != new).ravel())
    assert 0 < np.concatenate(changed).mean() < 1
    left, _, _ = jax.jit(rule.step)(dampened, after, RETAIN, FORGET)
    assert_close(left, dampened, 0)


def test_not_negates_the_first_convolution_and_learns_on():
    rule, (params, state), (negated, after) = prepared("not")
    expected = params | {"conv": {"kernel": -params["conv"]["kernel"]}}
    assert_close(negated, expected, 0)
    _, stepped, metrics = jax.jit(rule.step)(negated, after, RETAIN, FORGET)
    np.testing.assert_allclose(metrics["loss"], train_loss(expected, state, *RETAIN), rtol=1e-5)
    assert_close(first_gradients(stepped), direct_gradients(expected, state.batch_stats, RETAIN), 1e-4)
