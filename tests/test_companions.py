"""What stands beside the scores, by hand and against numpy; the parts have tests of their own."""

import json
import math

import numpy as np
import pytest
from example_record import example_record

from jaxunlearn.evaluation.companions import Companions, compared
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.evaluation.predictions import Predictions, Sets
from jaxunlearn.results import schema

CLASSES, FORGET = 3, 0
LABELS = Sets(np.array([0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 0, 0]), np.array([0, 0, 0]), np.array([1, 2, 1, 2]))


def says(labels, answers, confidence=0.9):
    """Logits of a softmax with `confidence` at each answer."""
    logits = np.full((len(labels), CLASSES), math.log((1 - confidence) / (CLASSES - 1)), np.float32)
    logits[np.arange(len(labels)), answers] = math.log(confidence)
    return logits


def model(test=(0, 0, 1, 1, 2, 2, 2, 2), forget=(0, 0, 0), retain=(1, 2, 1, 2), confidence=0.9):
    answers = Sets(test, forget, forget, retain)
    logits = Sets(*(says(*pair, confidence) for pair in zip(LABELS, answers, strict=True)))
    return Predictions(logits, Sets(*(logit * 2 for logit in logits)))


PRETRAINED = model()
FORGETFUL = model(test=(1, 2, 1, 2, 2, 2, 2, 1), forget=(1, 1, 2), retain=(1, 2, 2, 2))
JUDGE = Companions(LABELS, FORGET, augmented_scores=False)


def test_accuracies_and_answers_are_counted():
    beside = JUDGE.alone(FORGETFUL, PRETRAINED)
    assert beside["retain_train_acc"] == 3 / 4 and beside["forget_train_acc"] == 0
    assert beside["class_acc"] == [0, 1 / 2, 3 / 4] and beside["worst_retain_acc"] == 1 / 2
    assert beside["forgotten_as"] == {"train": [0, 2, 1], "test": [0, 1, 1]}
    assert sum(beside["histograms"]["members"]) == 3 and beside["histograms"]["non_members"][17] == 2  # of .9
    assert beside["roc"]["members"] == [k / 100 for k in range(101)]  # all tie
    json.dumps(beside, allow_nan=False)


def test_a_class_without_test_images_is_no_worst_class():
    labels = LABELS._replace(test=np.array([0, 0, 2, 2, 2, 2, 2, 2]))
    beside = Companions(labels, FORGET, False).alone(model(test=(0, 0, 2, 2, 2, 2, 2, 1)), None)
    assert beside["worst_retain_acc"] == 5 / 6 and beside["mask_divergence"] is None
    schema.check(example_record(companions=example_record()["companions"] | beside))


def test_metrics_keep_both_areas_and_score_by_one():
    calm, sure = model(confidence=0.8), model(confidence=0.95)
    own = PRETRAINED._replace(logits=PRETRAINED.logits._replace(
        forget_train=sure.logits.forget_train, augmented=calm.logits.augmented
    ))  # fmt: skip
    clean, augmented = (Companions(LABELS, FORGET, which).metrics(own) for which in (False, True))
    for metrics in (clean, augmented):
        assert tuple(metrics) == METRICS
        assert (metrics["forget_mia_auc"], metrics["forget_mia_auc_augmented"]) == (1, 0)
    assert clean["unlearn_score"] == pytest.approx((1 + 0 + 0) / 3)
    assert augmented["unlearn_score"] == pytest.approx((1 + 0 + 1) / 3)
    broken = own._replace(logits=own.logits._replace(test=own.logits.test * np.nan))
    assert set(JUDGE.metrics(broken).values()) == {None}


def masked(predictions):
    """The model with the class ruled out."""

    def ruled_out(logits):
        return np.where(np.arange(CLASSES) == FORGET, -np.inf, logits).astype(np.float32)

    return Predictions(Sets(*map(ruled_out, predictions.logits)), predictions.features)


def test_an_output_mask_is_nothing_but_the_mask():
    own = masked(PRETRAINED)
    assert JUDGE.metrics(own)["forget_acc"] == 0 and JUDGE.metrics(own)["retain_acc"] == 1
    assert JUDGE.alone(own, PRETRAINED)["mask_divergence"] == 0
    assert JUDGE.alone(PRETRAINED, PRETRAINED)["mask_divergence"] > 0.5
    whole = [JUDGE.full(one, [0.5] * 11) for one in (own, PRETRAINED)]
    assert whole[0]["probe_acc"] == whole[1]["probe_acc"]
    json.dumps([JUDGE.alone(own, PRETRAINED), whole], allow_nan=False)


def test_a_model_is_at_no_distance_from_itself_and_far_from_another():
    same, other = (JUDGE.against_retrain(one, FORGETFUL, 0.5, 0.5) for one in (FORGETFUL, PRETRAINED))
    assert same == {
        "gaps": dict.fromkeys(("retain_train", "forget_train", "retain_test", "forget_test"), 0),
        "average_gap": 0,
        "tug_of_war": 1,
        "js": pytest.approx(0, abs=1e-12),
        "activation_distance": 0,
    }
    assert other["gaps"] == {
        "retain_train": 1 / 4,
        "forget_train": 1,
        "retain_test": pytest.approx(1 / 3),
        "forget_test": 1,
    }
    assert other["tug_of_war"] == 0 and other["activation_distance"] == pytest.approx(0.85 * math.sqrt(2))


def test_full_companions_are_compared_with_those_of_a_retrained_model():
    own, there = ({"probe_acc": acc, "relearning": curve, "probe_excess": None, "relearn_ratio": None}
                  for acc, curve in ((0.9, [1.0, 0.4, 0.6]), (0.8, [0.0, 0.2, 0.3])))  # fmt: skip
    both = compared(own, there)
    assert both["probe_excess"] == pytest.approx(0.1) and both["relearn_ratio"] == pytest.approx(2)
    assert compared(own, there | {"relearning": [0.5, 0, 0]})["relearn_ratio"] is None
    assert own["relearn_ratio"] is None  # a new dictionary
