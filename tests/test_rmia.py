import numpy as np
import pytest

from jaxunlearn.audit.rmia import references_of, rmia_scores
from jaxunlearn.audit.separation import separation


def margin(*p):
    return np.log(np.array([p]) / (1 - np.array([p])))


def test_scores_are_shares_of_the_population_with_a_smaller_ratio():
    # 1.3 / 2 p_out + .7 / 2: ratios of the examples .9 / .675 and .1 / .675, of the others .8 / .87 and .99 / .48.
    scores = rmia_scores(margin(0.9, 0.1), margin(0.8, 0.99), margin(0.5, 0.5), margin(0.8, 0.2))
    np.testing.assert_array_equal(scores, [[0.5, 0.0]])


def test_a_ratio_that_ties_is_not_above():
    same = margin(0.3, 0.6)
    np.testing.assert_array_equal(rmia_scores(same, same, same, same), [[0.0, 0.5]])


@pytest.mark.parametrize(("shift", "caught"), [(0.0, False), (1.0, True), (8.0, True)])
def test_what_was_seen_is_told_from_what_was_not(shift, caught):
    rng = np.random.default_rng(0)
    examples, others = np.linspace(-3, 3, 40), np.linspace(-4, 4, 300)

    def models(count, shift=0.0):
        return examples + shift + rng.normal(size=(count, 40)), others + rng.normal(size=(count, 300))

    known = models(4)
    found = separation(*(rmia_scores(*side, *known) for side in (models(24, shift), models(24))))
    if caught:
        assert found["auc"] - found["auc_half_width"] > 0.6 and found["tpr_interval"][0] > 0.01
    else:
        assert abs(found["auc"] - 0.5) <= found["auc_half_width"]


def test_what_is_ruled_out_has_a_score():
    low = np.full((2, 3), -100.0)
    np.testing.assert_array_equal(rmia_scores(low, np.zeros((2, 5)), low[:1], np.zeros((1, 5))), np.zeros((2, 3)))


def test_a_quarter_of_the_models_are_references_at_most_four():
    assert [references_of(count) for count in (2, 4, 8, 16, 512)] == [1, 1, 2, 4, 4]
