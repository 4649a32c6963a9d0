import math

import numpy as np
import pytest
import scipy.stats

from jaxunlearn.results.statistics import Components, paired_difference, ranks, t_interval, variance_components


def by_seed(*values, first=0):
    return dict(enumerate(values, first))


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_half_width_is_that_of_scipys_interval(level):
    values = np.random.default_rng(0).normal(0.9, 0.01, 7)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert t_interval(list(values), level) == pytest.approx((high - low) / 2, rel=1e-12)


def test_two_values_have_the_interval_of_cauchys_distribution():
    # With one degree of freedom t(.975) = tan(.475 pi), and s / sqrt(2) is half the distance.
    assert t_interval([0.2, 0.6]) == pytest.approx(math.tan(0.475 * math.pi) * 0.2, rel=1e-12)
    assert t_interval([0.2]) is None and t_interval([]) is None


def test_a_paired_difference_is_over_common_seeds_whatever_their_order():
    a, b = {3: 0.9, 1: 0.8, 2: 0.95, 9: 0.0}, {1: 0.7, 2: 0.8, 3: 0.85, 7: 1.0}
    found = paired_difference(a, b)
    low, high = scipy.stats.ttest_rel([a[s] for s in (1, 2, 3)], [b[s] for s in (1, 2, 3)]).confidence_interval()
    assert (found.mean, found.pairs) == (pytest.approx(0.1), 3)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)
    assert paired_difference(a, {1: 0.7, 8: 0.8}) is None


def test_a_difference_that_every_seed_shows_separates_rows_that_overlap():
    spread = np.array([0.5, 0.7, 0.9])
    assert ranks([by_seed(*spread - 0.01), by_seed(*spread)]) == [2, 1]
    assert t_interval(list(spread)) > 0.4  # unpaired, nothing could be said


def test_what_cannot_be_told_from_the_best_shares_its_rank_and_the_next_is_third():
    rows = [by_seed(0.5, 0.51, 0.5), by_seed(0.9, 0.91, 0.92), by_seed(0.91, 0.9, 0.919)]
    assert ranks(rows) == [3, 1, 1]
    assert ranks([*rows, by_seed(0.501, 0.505, 0.499)]) == [3, 1, 1, 3]


def test_identical_rows_are_a_tie_and_so_are_all_rows_of_one_value():
    assert ranks([by_seed(0.1, 0.2), by_seed(0.1, 0.2), by_seed(0.1, 0.2)]) == [1, 1, 1]


def test_a_row_is_compared_with_the_leader_of_the_last_rank():
    # The third is not told from either of the others, the second is told from the first.
    rows = [by_seed(0.9, 0.9, 0.9), by_seed(0.8, 0.8, 0.8), by_seed(0.5, 0.95, 0.9)]
    assert ranks(rows) == [1, 2, 2]


def test_rows_without_two_seeds_in_common_are_not_ranked_and_block_nobody():
    assert ranks([by_seed(0.9), by_seed(0.8)]) == [None, None]
    assert ranks([by_seed(0.99), by_seed(0.8, 0.8), by_seed(0.5, 0.5)]) == [None, 1, 2]
    assert ranks([by_seed(0.8, 0.8), by_seed(0.7, 0.7, first=1), by_seed(0.5, 0.5)]) == [1, None, 2]
    assert ranks([]) == []


def test_a_leader_that_is_behind_on_the_common_seeds_ranks_nobody_below_itself():
    # The first has the higher mean by a seed that the other lacks.
    assert ranks([{0: 0.5, 1: 0.5, 2: 1.0}, {0: 0.6, 1: 0.6}]) == [1, 1]


def test_variance_components_of_a_balanced_design():
    # Means .4, .6, .8; within each a deviation of .1 about them: S_w = .02, S_b = 2 * .04.
    values = {1: [0.3, 0.5], 2: [0.5, 0.7], 3: [0.7, 0.9]}
    found = variance_components(values)
    assert found == pytest.approx((0.03, 0.02, 0.03 / 3 + 0.02 / 6))
    assert found.of_mean == pytest.approx(np.var([0.4, 0.6, 0.8], ddof=1) / 3)  # that of the originals' means
    ratio = (2 * found.train + found.unlearn) / found.unlearn
    assert ratio == pytest.approx(scipy.stats.f_oneway(*values.values()).statistic)


def test_originals_that_differ_less_than_their_unlearnings_have_no_variance_of_their_own():
    assert variance_components({1: [0.0, 1.0], 2: [0.0, 1.0]}) == pytest.approx((0.0, 0.5, 0.5 / 4))


def test_variance_components_of_an_unbalanced_design_are_unbiased():
    generator, sizes = np.random.default_rng(1), (1, 2, 5, 3)

    def draw():
        return {i: generator.normal(generator.normal(0, 2.0), 1.0, size) for i, size in enumerate(sizes)}

    drawn = [variance_components(draw()) for _ in range(4000)]
    between = [found.train for found in drawn]  # floored at zero, so a little high
    assert np.mean([found.unlearn for found in drawn]) == pytest.approx(1.0, rel=0.03)
    assert np.mean(between) == pytest.approx(4.0, rel=0.05)
    assert drawn[0].of_mean == pytest.approx(drawn[0].train / 4 + drawn[0].unlearn * (1 + 1 / 2 + 1 / 5 + 1 / 3) / 16)


def test_one_original_shows_only_the_spread_of_unlearning():
    assert variance_components({7: [0.1, 0.2, 0.3]}) == Components(None, pytest.approx(0.01), None)
    assert variance_components({7: [0.1], 8: [0.2]}) is None
