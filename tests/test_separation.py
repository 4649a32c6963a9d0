"""What is told apart is what was put in, and an interval is one over models."""

import numpy as np
import pytest

from jaxunlearn.audit.separation import CURVE, separation


def clustered(rng, models=8, examples=50, shift=0.0):
    """Scores f64[models, examples] of which half of the variance is the model's own."""
    return rng.normal(size=(models, 1)) + rng.normal(size=(models, examples)) + shift


def test_the_area_counts_pairs_and_ties_half():
    found = separation(np.array([[3.0, 1.0], [2.0, 4.0]]), np.array([[0.0, 1.0], [2.0, 0.0]]), threshold=1.5)
    assert found["auc"] == (4 + 2.5 + 3.5 + 4) / 16
    assert found["balanced_accuracy"] == (3 / 4 + 3 / 4) / 2
    assert found["tpr"] == 2 / 4  # above 2, which none of the retrained exceeds: what ties is not caught


def test_the_same_scores_are_at_chance_and_disjoint_ones_at_the_limit():
    scores = np.random.default_rng(0).normal(size=(10, 200))
    same = separation(scores, scores)
    assert same["auc"] == pytest.approx(0.5) and same["tpr"] == pytest.approx(0.01)
    np.testing.assert_allclose(same["curve"], CURVE, atol=1 / scores.size)
    apart = separation(scores + 100, scores)
    assert (apart["auc"], apart["auc_half_width"], apart["tpr"]) == (1, 0, 1)
    # Ten models of ten: no more is known than that, however many examples each has.
    assert apart["tpr_interval"] == pytest.approx([0.025**0.1, 1])
    assert separation(scores - 100, scores)["tpr_interval"] == pytest.approx([0, 1 - 0.025**0.1])


def test_pairs_of_one_model_are_not_taken_for_independent():
    """Where models differ by an offset of their own, intervals over pairs would rarely hold the truth."""
    rng = np.random.default_rng(0)
    found = [separation(clustered(rng), clustered(rng)) for _ in range(200)]
    covered = [abs(one["auc"] - 0.5) <= one["auc_half_width"] for one in found]
    assert 0.91 <= np.mean(covered) <= 0.99
    covered = [one["tpr_interval"][0] <= 0.01 <= one["tpr_interval"][1] for one in found]
    assert np.mean(covered) >= 0.9


def test_a_shift_is_found():
    rng = np.random.default_rng(0)
    found = separation(clustered(rng, 64, shift=1.0), clustered(rng, 64))
    # Of normals sqrt(2) wide, one apart: Phi(1 / 2).
    assert found["auc"] == pytest.approx(0.691, abs=0.05) and found["auc"] - found["auc_half_width"] > 0.6
    assert found["tpr_interval"][0] < found["tpr"] < found["tpr_interval"][1]
