"""Rules that are a loss, or that learn a part of the model: each against its equation, by numpy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import (
    CLASSES,
    FORGET,
    FRESH,
    LAYERS,
    MEAN,
    RATE,
    RETAIN,
    STD,
    STUDENT,
    TEACHER,
    assert_steps_down,
    batch,
    context,
    rule_of,
    single,
    start,
    stepped,
    student,
    teacher,
)
from linear import cross_entropy as ce
from linear import log_softmax

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.data.batches import Batch
from jaxunlearn.errors import UserError
from jaxunlearn.ingredients.labels import other_classes, random_labels, wrong_labels
from jaxunlearn.ingredients.masks import freeze_outside, largest, last_layers
from jaxunlearn.methods.boundary_shrink import rule as boundary_shrink
from jaxunlearn.methods.rule import Student
from jaxunlearn.models.network import make_network
from jaxunlearn.registry import build_rule, get_method

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]  # compiles in less time
ROWS = np.arange(len(FORGET.labels))


def retain_loss(params):
    (logits,), _ = student(params, RETAIN)
    return ce(logits, RETAIN.labels)


def with_retain(forget_loss):
    """A loss of both batches, retain's forward first: CE(retain) and `forget_loss(logits)`."""

    def loss(params):
        (logits, forget_logits), _ = student(params, RETAIN, FORGET)
        return ce(logits, RETAIN.labels) + forget_loss(forget_logits)

    return loss


def of_forget(forget_loss):
    """A loss of the forget batch alone: `forget_loss(logits)`."""
    return lambda params: forget_loss(student(params, FORGET)[0][0])


def softmax_of_others(logits):
    """Softmax over all classes but each image's own."""
    raised = np.exp(logits)
    raised[ROWS, FORGET.labels] = 0
    return raised / raised.sum(-1, keepdims=True)


def assert_stats(state, *batches):
    _, stats = student(STUDENT[0], *batches)
    for name, layer in stats.items():
        np.testing.assert_allclose(state.batch_stats[name]["mean"], layer["mean"], rtol=1e-5, atol=1e-6)


def test_gradient_ascent_climbs_on_forget_alone():
    result = stepped("gradient_ascent")
    assert_steps_down(result, of_forget(lambda logits: -ce(logits, FORGET.labels)))
    assert_stats(result[1], FORGET)


def test_random_label_learns_labels_that_are_drawn_in_the_step():
    rule = rule_of("random_label")
    drawn = random_labels(Student(context(), None, start(rule)).random_key(), FORGET.labels, CLASSES)
    result = stepped("random_label")
    assert_steps_down(result, with_retain(lambda logits: ce(logits, drawn)))
    assert_stats(result[1], RETAIN, FORGET)


def test_random_labels_are_of_all_classes_and_new_with_every_key():
    own = jnp.full(4000, 2)
    first, second = (np.asarray(random_labels(jax.random.key(seed), own, CLASSES)) for seed in (0, 1))
    np.testing.assert_allclose(np.bincount(first, minlength=CLASSES) / 4000, 1 / CLASSES, atol=0.03)
    assert 0.7 < (first != second).mean() < 0.8


def test_amnesiac_learns_one_wrong_label_an_image():
    result = stepped("amnesiac")
    wrong = wrong_labels(jax.random.key(3), FORGET.indices, FORGET.labels, CLASSES)
    assert_steps_down(result, with_retain(lambda logits: ce(logits, wrong)))
    assert_stats(result[1], RETAIN, FORGET)


def test_a_wrong_label_stays_with_its_image_in_later_steps_and_other_batches():
    rule = rule_of("amnesiac")
    step = jax.jit(rule.step)
    retain, forget = (jax.tree.map(jnp.asarray, batch) for batch in (RETAIN, FORGET))
    mixed = jax.tree.map(lambda x: x[::-1], forget)
    later = start(rule)._replace(key=jax.random.key(9), step=jnp.int32(7))
    losses = [
        step(single(STUDENT[0]), state, retain, given)[2]["loss"]
        for state, given in ((start(rule), forget), (later, mixed))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_wrong_labels_are_never_an_images_own_and_the_others_alike():
    own, key = jnp.full(6000, 2), jax.random.key(0)
    wrong = np.asarray(wrong_labels(key, jnp.arange(6000), own, CLASSES))
    np.testing.assert_allclose(np.bincount(wrong, minlength=CLASSES) / 6000, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)
    assert (wrong != wrong_labels(jax.random.key(1), jnp.arange(6000), own, CLASSES)).any()
    assert set(np.asarray(wrong_labels(key, jnp.arange(9), jnp.ones(9, jnp.int32), 2))) == {0}


@pytest.mark.parametrize(("epoch", "weight"), [(0, 1), (6, 0.25)])
def test_l1_sparse_draws_all_weights_to_zero_less_with_every_epoch(epoch, weight):
    def loss(params):
        return retain_loss(params) + 0.01 * weight * sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(params))

    assert_steps_down(stepped("l1_sparse", gamma="0.01", epoch=epoch), loss)


def test_delete_teaches_what_the_pretrained_model_thinks_without_the_label():
    target = softmax_of_others(teacher(FORGET.images))
    entropy = -np.where(target > 0, target * np.log(np.maximum(target, 1e-300)), 0).sum(-1).mean()

    def loss(logits):
        return -(target * log_softmax(logits)).sum(-1).mean() - entropy

    result = stepped("delete")
    assert_steps_down(result, of_forget(loss))
    assert_stats(result[1], FORGET)


def reverse_ce(logits):
    return -np.log(1 - np.exp(log_softmax(logits)[ROWS, FORGET.labels])).mean()


def test_reverse_ce_is_the_chance_of_any_other_class():
    result = stepped("reverse_ce")
    assert_steps_down(result, with_retain(reverse_ce))
    assert_stats(result[1], RETAIN, FORGET)


def test_reverse_ce_is_delete_with_the_model_as_its_own_teacher():
    logits = np.random.default_rng(0).normal(size=(5, CLASSES))
    p, q, by = np.exp(log_softmax(logits)), softmax_of_others(logits), 1e-6
    step = by * np.eye(CLASSES)
    for row in ROWS:
        ahead, behind = (np.where(ROWS[:, None] == row, logits + way * step[:, None], logits) for way in (1, -1))
        slopes = [(reverse_ce(up) - reverse_ce(down)) / (2 * by) for up, down in zip(ahead, behind, strict=True)]
        np.testing.assert_allclose(slopes, (p - q)[row] / len(ROWS), atol=1e-7)


@pytest.mark.parametrize("certain", [200.0, -200.0])
def test_reverse_ce_of_a_certain_model_has_its_slope(certain):
    params = single(STUDENT[0])
    params["linear"]["bias"] = params["linear"]["bias"].at[1].set(certain)
    forget, rule = batch(5, 11, labels=1), rule_of("reverse_ce")
    batches = (jax.tree.map(jnp.asarray, each) for each in (RETAIN, forget))
    after, _, metrics = jax.jit(rule.step)(params, start(rule), *batches)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    slopes = (certain > 0) - (RETAIN.labels == 1).mean() + (certain > 0)  # of CE(retain), of the other
    np.testing.assert_allclose(after["linear"]["bias"][1] - certain, -RATE * slopes, atol=1e-4)


def test_cf_k_learns_in_the_last_layers_alone():
    learning, result = ["conv2", "bn2", "linear"], stepped("cf_k", k="2")
    assert_steps_down(result, retain_loss, learning)
    _, moved = student(STUDENT[0], RETAIN)
    for name, layer in result[1].batch_stats.items():
        expected = moved[name]["mean"] if name in learning else single(TEACHER[1])[name]["mean"]
        np.testing.assert_allclose(layer["mean"], expected, rtol=1e-5 if name in learning else 0)


def test_eu_k_starts_from_fresh_layers_and_goes_on_as_cf_k():
    rule, params = rule_of("eu_k", k="2"), single(STUDENT[0])
    before = start(rule)
    after, state = rule.prepare(params, before, [], [])
    fresh = ["conv2", "bn2", "linear"]
    for name in params:
        jax.tree.map(np.testing.assert_array_equal, after[name], single((FRESH if name in fresh else STUDENT)[0])[name])
    for name in state.batch_stats:
        expected = single((FRESH if name in fresh else TEACHER)[1])[name]
        jax.tree.map(np.testing.assert_array_equal, state.batch_stats[name], expected)
    assert_steps_down(stepped("eu_k", k="2"), retain_loss, fresh)


def test_negate_first_negates_one_kernel_and_goes_on_as_finetuning():
    rule, params = rule_of("negate_first"), single(STUDENT[0])
    before = start(rule)
    after, state = rule.prepare(params, before, [], [])
    np.testing.assert_array_equal(after["conv1"].pop("kernel"), -params["conv1"]["kernel"])
    expected = params | {"conv1": {}}
    jax.tree.map(np.testing.assert_array_equal, (after, state.batch_stats), (expected, before.batch_stats))
    assert_steps_down(stepped("negate_first"), retain_loss)
    preceded = build_rule(get_method("negate_first"), context()._replace(layers=lambda: ("bn2", *LAYERS)))
    np.testing.assert_array_equal(
        preceded.prepare(params, before, [], [])[0]["conv1"]["kernel"], -params["conv1"]["kernel"]
    )


def attacked(eps):
    """The labels of the forget images after the attack, by numpy."""
    images = np.asarray(FORGET.images, np.float64)
    pixels = images * STD + MEAN
    raised = np.empty_like(pixels)
    for place in np.ndindex(pixels.shape):
        losses = []
        for by in (1e-5, -1e-5):
            moved = images.copy()
            moved[place] += by
            losses.append(ce(teacher(moved), FORGET.labels))
        raised[place] = pixels[place] + eps * np.sign(losses[0] - losses[1])
    raised = np.round(np.clip(raised, 0, 1) * 255) / 255
    return teacher((raised - MEAN) / STD).argmax(-1)


def test_boundary_shrink_learns_what_the_pretrained_model_sees_in_attacked_images():
    labels = attacked(0.4)
    result = stepped("boundary_shrink", eps="0.4")
    assert_steps_down(result, of_forget(lambda logits: ce(logits, labels)))
    assert_stats(result[1], FORGET)
    assert (labels != teacher(FORGET.images).argmax(-1)).any()


@pytest.mark.parametrize(
    ("pixel", "eps", "boundary", "label"),
    [
        pytest.param(100, 0.6, 100.8, 1, id="rounded-up"),
        pytest.param(100, 0.4, 100.2, 0, id="rounded-back"),
        pytest.param(255, 3.0, 256.5, 0, id="clipped"),
        pytest.param(100, 3.0, 101.5, 1, id="across"),
        pytest.param(100, 3.0, 110.0, 0, id="failed"),
    ],
)
def test_an_attacked_image_is_one_of_whole_pixels(pixel, eps, boundary, label):
    def answers(params, stats, images):
        brightness = (images * jnp.array(STD) + jnp.array(MEAN)).mean() * 255
        return jnp.stack([0.0, brightness - boundary])[None]

    images = jnp.full((1, 2, 2, 3), pixel / 255) / jnp.array(STD) - jnp.array(MEAN) / jnp.array(STD)
    given = context(apply_eval=answers, apply_train=lambda params, stats, images, key: (params["logits"], stats))
    rule, params = boundary_shrink(given, eps=eps / 255), {"logits": jnp.array([[0.0, 5.0]])}
    forget = Batch(images, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    metrics = rule.step(params, rule.init(params, (), jax.random.key(0)), None, forget)[2]
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(-5 if label else 5)), rtol=1e-4)


def test_other_classes_have_the_whole_softmax():
    logits = jnp.array([[1.0, 2.0, 3.0], [0.0, 50.0, 0.0]])
    others = jax.nn.softmax(other_classes(logits, jnp.array([2, 1])))
    np.testing.assert_allclose(others, [[1 / (1 + np.e), np.e / (1 + np.e), 0], [0.5, 0, 0.5]], rtol=1e-6)


def test_the_largest_are_found_over_all_arrays_together():
    tree = {"a": jnp.array([[5.0, 1.0], [2.0, 8.0]]), "b": jnp.array([7.0, 3.0])}
    mask = largest(tree, 0.5)
    np.testing.assert_array_equal(mask["a"], [[True, False], [False, True]])
    np.testing.assert_array_equal(mask["b"], [True, False])
    assert all(leaf.all() for leaf in jax.tree.leaves(largest(tree, 1.0)))


def test_gradients_flow_where_a_mask_is_on():
    params, mask = {"w": jnp.array([2.0, 3.0])}, {"w": jnp.array([True, False])}
    value, gradients = jax.value_and_grad(lambda p: (freeze_outside(p, mask)["w"] ** 2).sum())(params)
    assert value == 13
    np.testing.assert_array_equal(gradients["w"], [4, 0])


def test_the_last_eight_layers_of_a_resnet_are_its_last_stage_and_head():
    network = make_network(BENCHMARKS["resnet20-cifar10-class0"], 10)
    names = network.layers()
    params, _ = jax.eval_shape(network.initialise, jax.random.key(0))
    assert last_layers(names, params, 8) == {name for name in names if name.startswith(("layer3.", "linear"))}
    assert last_layers(names, params, 7) == last_layers(names, params, 8) - {"layer3.0.conv1", "layer3.0.bn1"}
    assert last_layers(names, params, 99) == {*names}


def test_a_batch_norm_without_a_layer_of_its_own_belongs_to_the_one_before_it():
    names = ["norm", "conv1", "bn1", "bn2", "conv2", "linear", "last"]
    params = {name: {"kernel": 0} if name.startswith(("conv", "linear")) else {"scale": 0} for name in names}
    assert last_layers(names, params, 1) == {"linear", "last"}
    assert last_layers(names, params, 2) == {"conv2", "linear", "last"}
    assert last_layers(names, params, 3) == {*names}  # what is before all belongs to the first


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cf_k.k=0", "k is 0: it must be more than 0"),
        ("eu_k.k=-1", "k is -1: it must be more than 0"),
        ("scrub.temperature=0", "temperature is 0.0: it must be more than 0"),
        ("adaptive_uniform.max_norm=0", "max_norm is 0.0: it must be more than 0"),
        ("unsir.images=0", "images is 0: it must be more than 0"),
        ("fisher.alpha=-1", "alpha is -1.0: it must be more than 0"),
        ("importance_masked.limits=(1.0,)", "limits is (1.0,): it must be 2 numbers"),
        ("munba.fallback=()", "fallback is (): it must be 2 numbers"),
    ],
)
def test_hyperparameters_that_would_do_nothing_are_refused_in_a_line(setting, said):
    place, value = setting.split("=")
    name, key = place.split(".")
    with pytest.raises(UserError, match=f"{re.escape(said)}$"):
        rule_of(name, **{key: value})
