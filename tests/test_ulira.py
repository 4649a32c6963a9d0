import numpy as np
import pytest

from jaxunlearn.audit.separation import separation
from jaxunlearn.audit.ulira import folds_of, ulira_scores


def phis(rng, models=16, examples=40, shift=0.0):
    """Margins of models that find some examples easy and others hard."""
    return np.linspace(-5, 5, examples) + rng.normal(size=(models, examples)) + shift


def test_no_model_has_a_part_in_the_fit_that_scores_it_nor_in_that_of_its_pair():
    rng = np.random.default_rng(0)
    unlearned, retrained = phis(rng), phis(rng)
    changed = retrained.copy()
    changed[5] += 7
    (before, _), (after, _) = ulira_scores(unlearned, retrained), ulira_scores(unlearned, changed)
    fold = np.arange(16) % folds_of(16) == 5 % folds_of(16)
    np.testing.assert_array_equal(after[fold], before[fold])
    assert (after[~fold] != before[~fold]).any(axis=1).all()


def test_scores_are_the_log_ratio_of_two_normals():
    unlearned, retrained = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[0.0], [1.0], [0.0], [1.0]])
    scores, _ = ulira_scores(unlearned, retrained)
    # Rows 0 and 2 are one fold; the other's means are 3 and 1, its deviations sqrt(2) and the least there is.
    assert scores[0, 0] == pytest.approx(-np.log(np.sqrt(2)) - (1 - 3) ** 2 / 4 + np.log(1e-3))


def test_few_models_share_a_deviation_and_many_have_one_an_example():
    rng = np.random.default_rng(0)
    wide = np.where(np.arange(40) % 2, 3.0, 0.3)

    def area(models):
        unlearned, retrained = (phis(rng, models) * wide for _ in range(2))
        return ulira_scores(unlearned + wide, retrained)[0].std(axis=0)

    few, many = area(16), area(128)
    assert few[1::2].mean() > 5 * few[::2].mean()  # one deviation for all: those that are spread count for more
    assert many[1::2].mean() == pytest.approx(many[::2].mean(), rel=0.1)


@pytest.mark.parametrize(("models", "pooled"), [(85, True), (86, False)])  # of 85 one fit has 63, the others 64
def test_all_folds_have_the_same_kind_of_deviation(models, pooled):
    rng = np.random.default_rng(0)
    wide = np.where(np.arange(40) % 2, 3.0, 0.3)
    scores = ulira_scores(phis(rng, models) * wide + wide, phis(rng, models) * wide)[0]
    for fold in range(4):
        spread = scores[fold::4].std(axis=0)
        assert bool(spread[1::2].mean() > 5 * spread[::2].mean()) is pooled


@pytest.mark.parametrize("models", [4, 8, 32])
def test_retrained_models_are_at_chance_and_untouched_ones_are_caught(models):
    rng = np.random.default_rng(1)
    retrained = phis(rng, models)
    never = separation(*ulira_scores(phis(rng, models), retrained), threshold=0.0)
    assert abs(never["auc"] - 0.5) <= never["auc_half_width"]
    assert never["tpr_interval"][0] <= 0.01 <= never["tpr_interval"][1]
    untouched = separation(*ulira_scores(phis(rng, models, shift=8), retrained), threshold=0.0)
    assert untouched["auc"] > 0.999 and untouched["balanced_accuracy"] > 0.99 and untouched["tpr"] > 0.99


def test_a_planted_leak_is_found():
    """Retrained models that have seen the images once more are a little surer of them: one deviation."""
    rng = np.random.default_rng(2)
    found = separation(*ulira_scores(phis(rng, 32, shift=1.0), phis(rng, 32)), threshold=0.0)
    # Normals one deviation apart: Phi(1 / sqrt(2)) and Phi(1 / 2); the fit, of 24 models, costs a little.
    assert found["auc"] == pytest.approx(0.760, abs=0.04) and found["balanced_accuracy"] == pytest.approx(
        0.691, abs=0.04
    )
    assert found["tpr_interval"][0] > 0.01


def test_the_same_models_twice_are_at_chance():
    margins = phis(np.random.default_rng(0))
    unlearned, retrained = ulira_scores(margins, margins)
    found = separation(unlearned, retrained, threshold=0.0)
    assert (found["auc"], found["balanced_accuracy"]) == (0.5, 0.5)


def test_an_answer_that_is_always_ruled_out_is_caught():
    rng = np.random.default_rng(0)
    found = separation(*ulira_scores(np.full((8, 40), -100.0), phis(rng, 8)), threshold=0.0)
    assert (found["auc"], found["tpr"], found["balanced_accuracy"]) == (1, 1, 1)


def test_intervals_know_that_folds_share_their_fits():
    """Over models that all never saw the images, half of whose variance is an offset of the model's own."""
    rng = np.random.default_rng(0)

    def models():
        return (rng.normal(size=(8, 1)) + phis(rng, 8, 20)) / np.sqrt(2)

    covered = []
    for _ in range(100):
        found = separation(*ulira_scores(models(), models()), threshold=0.0, folds=folds_of(8))
        covered.append([abs(found[name] - 0.5) <= found[f"{name}_half_width"] for name in ("auc", "balanced_accuracy")])
    assert (np.mean(covered, axis=0) >= 0.92).all()
