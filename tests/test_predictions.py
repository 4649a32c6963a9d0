import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from tiny import CLASSES, PROTOCOL, make_images, make_models, mesh_of

from jaxunlearn.data.batches import normalise
from jaxunlearn.evaluation import predictions
from jaxunlearn.evaluation.predictions import Evaluator, Predictions, Sets, packed
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import seed_keys
from jaxunlearn.training.loop import Timing
from jaxunlearn.training.unlearning import Split

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]
TEST, TRAIN = make_images(23, seed=1), make_images(57, seed=2)
FORGET = PROTOCOL.forget_class
SPLIT = Split(np.flatnonzero(TRAIN.labels != FORGET), np.flatnonzero(TRAIN.labels == FORGET))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(predictions, "BATCH_SIZE", 16)  # 84 images: the last batch is not full


@functools.cache
def evaluator_of(split=(1, 1), features=False, **changes):
    protocol, mesh = dataclasses.replace(PROTOCOL, **changes), mesh_of(*split)
    return Evaluator(make_network(protocol, CLASSES), protocol, TRAIN, SPLIT, TEST, mesh, Timing(), features)


def evaluate(change=lambda models: models, keys=(1, 2), split=(1, 1), **options):
    """(models, predictions) of two seeds' models."""
    with jax.set_mesh(mesh_of(*split)):
        models = change(make_models(PROTOCOL, (1, 2), mesh_of(*split)))
        return jax.device_get(models), evaluator_of(split, **options).predict(*models, seed_keys(keys))


def directly(models, seed, images):
    """The network's own answer: (logits, features)."""
    params, batch_stats = jax.tree.map(lambda x: x[seed], models)
    pixels = normalise(jnp.asarray(images), PROTOCOL)
    said = make_network(PROTOCOL, CLASSES).forward(params, batch_stats, pixels, jax.random.key(0), False, False)
    return said.logits, said.features


@pytest.mark.parametrize("split", [(1, 1), (2, 2)])
def test_what_is_said_of_each_set_is_what_the_model_says(split):
    models, both = evaluate(split=split, features=True)
    sets = TEST.images, TRAIN.images[SPLIT.forget], TRAIN.images[SPLIT.retain[:23]]
    for seed, own in enumerate(both):
        for name, images in zip(("test", "forget_train", "retain_train"), sets, strict=True):
            logits, features = directly(models, seed, images)
            np.testing.assert_allclose(getattr(own.logits, name), logits, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(getattr(own.features, name), features, rtol=1e-4, atol=1e-5)
        assert [len(one) for one in own.logits] == [23, 19, 19, 23]
    assert (both[0].logits.test != both[1].logits.test).any()


def test_features_are_left_out_unless_asked_for_and_change_nothing():
    _, plain = evaluate()
    _, whole = evaluate(features=True)
    for one, other in zip(plain, whole, strict=True):
        assert one.features is None
        for a, b in zip(one.logits, other.logits, strict=True):
            np.testing.assert_array_equal(a, b)


def test_labels_and_counts_are_those_of_the_sets():
    evaluator = evaluator_of()
    assert evaluator.counts == (19, 8)
    np.testing.assert_array_equal(evaluator.labels.test, TEST.labels)
    np.testing.assert_array_equal(evaluator.labels.retain_train, TRAIN.labels[SPLIT.retain[:23]])
    assert set(evaluator.labels.forget_train) == set(evaluator.labels.augmented) == {FORGET}


def test_augmented_members_differ_by_the_seed_and_nothing_else_does():
    _, one = evaluate(crop_pixels=8)
    _, other = evaluate(crop_pixels=8, keys=(1, 3))
    for name in Sets._fields:
        np.testing.assert_array_equal(getattr(one[0].logits, name), getattr(other[0].logits, name))
        same = (getattr(one[1].logits, name) == getattr(other[1].logits, name)).all(1)
        assert same.mean() < 0.2 if name == "augmented" else same.all()  # a draw may repeat
    assert (one[0].logits.augmented != one[0].logits.forget_train).any(1).mean() > 0.8


def with_bias(value, label):
    def change(models):
        params, batch_stats = models
        bias = params["linear"]["bias"].at[0, label].set(value)
        return params | {"linear": params["linear"] | {"bias": bias}}, batch_stats

    return change


@pytest.mark.parametrize(
    ("value", "label", "finite"),
    [(-np.inf, FORGET, True), (np.inf, FORGET, False), (np.nan, FORGET, False), (-np.inf, 2, False)],
)
def test_an_infinite_logit_is_divergence_but_where_the_class_is_ruled_out(value, label, finite):
    _, (changed, other) = evaluate(with_bias(value, label))
    _, (_, expected) = evaluate()
    assert changed.finite(FORGET) is finite and other.finite(FORGET)
    np.testing.assert_array_equal(other.logits.test, expected.logits.test)  # a seed does not feel another's


def test_kept_predictions_are_log_probabilities_with_labels():
    rng = np.random.default_rng(0)
    logits = Sets(*(rng.normal(0, 5, (size, 4)).astype(np.float32) for size in (5, 3, 3, 5)))
    logits.test[0] = [-np.inf, 0, 1, 2]
    logits.test[1] = [0, 1e6, 0, 0]
    labels = Sets(*(rng.integers(0, 4, len(one)) for one in logits))
    arrays = np.load(io.BytesIO(packed(Predictions(logits, None), labels)))
    assert set(arrays) == {*Sets._fields, *(f"{name}_labels" for name in Sets._fields)}
    for name in Sets._fields:
        assert arrays[name].dtype == np.float16
        expected = softmax(getattr(logits, name).astype(np.float64), 1)
        np.testing.assert_allclose(np.exp(arrays[name].astype(np.float64)), expected, atol=2e-3)
        np.testing.assert_array_equal(arrays[f"{name}_labels"], getattr(labels, name))
    assert np.isneginf(arrays["test"][0, 0]) and arrays["test"][1, 0] == np.float16(-65504)
