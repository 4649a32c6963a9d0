import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxunlearn.evaluation import metrics


def pairs_auc(members, non_members):
    below = (members[:, None] > non_members[None, :]).sum() + 0.5 * (members[:, None] == non_members[None, :]).sum()
    return below / (members.size * non_members.size)


@pytest.mark.parametrize("levels", [1, 2, 5, None])  # distinct values among the scores; None: all distinct
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (50, 200)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_auc_counts_pairs(levels, sizes, dtype):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, levels, sum(sizes)) / levels if levels else rng.permutation(sum(sizes)) / 512
    members, non_members = np.split(scores.astype(dtype), [sizes[0]])
    auc = metrics.mann_whitney_auc(members, non_members)
    is_member = np.arange(sum(sizes)) < sizes[0]
    assert auc == pairs_auc(members, non_members)
    assert auc == pytest.approx(roc_auc_score(is_member, scores.astype(dtype)), abs=1e-12)
    if levels is None:
        assert metrics.published_auc(members, non_members) == auc
    else:
        assert metrics.published_auc(members, non_members) <= auc


def test_auc_ignores_order_and_monotone_maps():
    rng = np.random.default_rng(1)
    members, non_members = rng.integers(0, 9, 40) / 8, rng.integers(0, 9, 30) / 8
    auc = metrics.mann_whitney_auc(members, non_members)
    assert metrics.mann_whitney_auc(rng.permutation(members), rng.permutation(non_members)) == auc
    assert metrics.mann_whitney_auc(np.exp(members), np.exp(non_members)) == auc
    assert metrics.mann_whitney_auc(non_members, members) == pytest.approx(1 - auc, abs=1e-15)


def test_all_tied():
    ones = np.ones(600, np.float32)
    assert metrics.mann_whitney_auc(ones[:500], ones[:100]) == 0.5
    assert metrics.published_auc(ones[:500], ones[:100]) == 0.0


def test_published_rule_by_hand():
    # Sorted, ties in the order members, non-members: .2(n) .5(m) .5(m) .5(n) .9(m): member ranks 2 + 3 + 5 = 10.
    members, non_members = np.array([0.5, 0.9, 0.5]), np.array([0.5, 0.2])
    assert metrics.published_auc(members, non_members) == (10 - 6) / 6
    assert metrics.mann_whitney_auc(members, non_members) == (11 - 6) / 6  # .5 has rank 3 three times: 3 + 3 + 5


@pytest.mark.parametrize("bad", [[], [[0.5]], [math.nan], [math.inf]])
def test_auc_rejects(bad):
    for function in (metrics.mann_whitney_auc, metrics.published_auc):
        with pytest.raises(ValueError, match="must be"):
            function(bad, [0.5])
        with pytest.raises(ValueError, match="must be"):
            function([0.5], bad)


def test_unlearning_metrics_by_hand():
    result = metrics.unlearning_metrics(
        test_correct=np.array([True, True, True, False, True, False, False, False]),
        test_labels=np.array([1, 2, 3, 1, 0, 0, 0, 0], np.int32),
        forget_class=0,
        member_confidence=np.array([0.5, 0.9, 0.5], np.float32),
        non_member_confidence=np.array([0.5, 0.2], np.float32),
        augmented_confidence=np.array([0.1, 0.5, 0.6], np.float32),
    )
    assert tuple(result) == metrics.METRICS
    assert all(type(value) is float for value in result.values())
    assert result == pytest.approx(
        {
            "retain_acc": 3 / 4,
            "forget_acc": 1 / 4,
            "forget_mia_auc": 5 / 6,
            "forget_mia_auc_augmented": (0 + 1.5 + 2) / 6,
            "unlearn_score": (3 / 4 + 3 / 4 + 1 / 6) / 3,
            "symmetric_score": (3 / 4 + 3 / 4 + 1 / 3) / 3,
            "forget_mia_auc_published": 4 / 6,
            "unlearn_score_published": (3 / 4 + 3 / 4 + 2 / 6) / 3,
        }
    )


def test_symmetric_score_rewards_only_one_half():
    low, high = np.arange(10) / 20, np.arange(10, 20) / 20
    labels = np.array([0, 1])
    inverted = metrics.unlearning_metrics([False, True], labels, 0, low, high, low)
    exposed = metrics.unlearning_metrics([False, True], labels, 0, high, low, high)
    assert (inverted["unlearn_score"], exposed["unlearn_score"]) == pytest.approx((1, 2 / 3))
    assert inverted["symmetric_score"] == exposed["symmetric_score"] == pytest.approx(2 / 3)
    assert metrics.unlearning_metrics([False, True], labels, 0, low, low, low)["symmetric_score"] == 1


def test_scores_are_of_one_area_and_both_are_there():
    low, high, labels = np.arange(10) / 20, np.arange(10, 20) / 20, np.array([0, 1])
    for augmented_scores in (False, True):
        result = metrics.unlearning_metrics([False, True], labels, 0, high, low, np.zeros(10), augmented_scores)
        assert (result["forget_mia_auc"], result["forget_mia_auc_augmented"]) == (1, 0.05)
        assert result["unlearn_score"] == pytest.approx((1 + 1 + (0.95 if augmented_scores else 0)) / 3)


def test_no_accuracy_for_a_failed_model():
    with pytest.raises(ValueError, match="finite"):
        metrics.unlearning_metrics([True, True], [0, 1], 0, [math.nan], [0.5], [0.5])
    assert tuple(metrics.diverged_metrics()) == metrics.METRICS
    assert set(metrics.diverged_metrics().values()) == {None}


def test_unlearning_metrics_rejects():
    with pytest.raises(ValueError, match="class 2"):
        metrics.unlearning_metrics([True, True], [0, 1], 2, [0.5], [0.5], [0.5])
    with pytest.raises(ValueError, match="class 1"):
        metrics.unlearning_metrics([True, True], [1, 1], 1, [0.5], [0.5], [0.5])
    with pytest.raises(ValueError, match="one length"):
        metrics.unlearning_metrics([True], [0, 1], 0, [0.5], [0.5], [0.5])


def test_auc_standard_error():
    assert metrics.auc_standard_error(500, 100) == pytest.approx(0.0316, abs=1e-4)
    rng = np.random.default_rng(2)
    areas = [metrics.mann_whitney_auc(rng.random(60), rng.random(30)) for _ in range(2000)]
    assert np.std(areas) == pytest.approx(metrics.auc_standard_error(60, 30), rel=0.05)
