import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, PROTOCOL, assert_close, make_images, make_models, mesh_of

from jaxunlearn.data.batches import Images, normalise
from jaxunlearn.evaluation import predictions
from jaxunlearn.evaluation.metrics import METRICS, unlearning_metrics
from jaxunlearn.evaluation.predictions import Evaluator
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import seed_keys
from jaxunlearn.training.loop import Timing

pytestmark = pytest.mark.usefixtures("tiny_models")
TEST, MEMBERS = make_images(23, seed=1), Images(*(part[::CLASSES] for part in make_images(57, seed=2)))  # 23 + 19
FORGET = PROTOCOL.forget_class


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(predictions, "BATCH_SIZE", 16)  # 42 images: the last batch is not full


@functools.cache
def evaluator_of(split=(1, 1), **changes):
    protocol, mesh = dataclasses.replace(PROTOCOL, **changes), mesh_of(*split)
    return Evaluator(make_network(protocol, CLASSES), protocol, TEST, MEMBERS, mesh, Timing())


def evaluate(change=lambda models: models, keys=(1, 2), split=(1, 1), **changes):
    """(models, predictions, metrics) of two seeds' models."""
    with jax.set_mesh(mesh_of(*split)):
        models = change(make_models(PROTOCOL, (1, 2), mesh_of(*split)))
        evaluator, arguments = evaluator_of(split, **changes), (*models, seed_keys(keys))
        return jax.device_get(models), evaluator.predict(*arguments), evaluator.metrics(*arguments)


def directly(models, seed):
    """What numpy makes of a model's logits: (confidence, correct), the test images then the members."""
    params, batch_stats = jax.tree.map(lambda x: x[seed], models)
    pixels, labels = map(np.concatenate, zip(TEST, MEMBERS, strict=True))
    images = normalise(jnp.asarray(pixels), PROTOCOL)
    logits = np.asarray(make_network(PROTOCOL, CLASSES).apply_eval(params, batch_stats, images), np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return (odds / odds.sum(-1, keepdims=True)).max(-1), logits.argmax(-1) == labels


@pytest.mark.parametrize("split", [(1, 1), (2, 2)])
def test_predictions_and_metrics_are_those_of_the_model_applied_directly(split):
    models, predictions, metrics = evaluate(split=split)
    assert predictions.finite.all()
    for seed in range(2):
        confidence, correct = directly(models, seed)
        np.testing.assert_allclose(predictions.confidence[seed], confidence, rtol=1e-5)
        np.testing.assert_array_equal(predictions.correct[seed], correct)
        # The attack ranks: what differs by rounding must not decide, so it gets the confidences as they came.
        members, others = predictions.confidence[seed][23:], predictions.confidence[seed][:23][TEST.labels == FORGET]
        assert (len(members), len(others)) == (19, 8)
        assert metrics[seed] == unlearning_metrics(correct[:23], TEST.labels, FORGET, members, others)
    assert metrics[0] != metrics[1]


def test_counts_are_members_and_non_members():
    assert evaluator_of().counts == (19, 8)


def test_a_model_that_is_not_finite_has_no_metrics_and_harms_no_other():
    def broken(models):
        params, batch_stats = models
        return jax.tree.map(lambda x: x.at[1].set(jnp.nan), params), batch_stats

    _, predictions, metrics = evaluate(broken)
    _, expected, expected_metrics = evaluate()
    assert metrics == [expected_metrics[0], dict.fromkeys(METRICS)]
    assert_close([part[:1] for part in predictions], [part[:1] for part in expected], 0)
    assert not predictions.finite[1].any()


def test_one_infinite_logit_is_enough_to_have_diverged():
    def broken(models):
        params, batch_stats = models
        bias = params["linear"]["bias"].at[0, 2].set(-jnp.inf)
        return params | {"linear": params["linear"] | {"bias": bias}}, batch_stats

    _, _, metrics = evaluate(broken)
    assert metrics[0] == dict.fromkeys(METRICS)
    assert metrics[1]["retain_acc"] is not None


def test_mia_augment_changes_the_members_only_and_by_the_seed():
    _, clean, _ = evaluate()
    _, augmented, _ = evaluate(mia_augment=True, crop_pixels=8)
    _, other, _ = evaluate(mia_augment=True, crop_pixels=8, keys=(1, 3))
    np.testing.assert_array_equal(augmented.confidence[:, :23], clean.confidence[:, :23])
    assert (augmented.confidence[:, 23:] != clean.confidence[:, 23:]).all()
    np.testing.assert_array_equal(augmented.confidence[0], other.confidence[0])
    assert (augmented.confidence[1, 23:] != other.confidence[1, 23:]).any()
