import numpy as np
import pytest

from jaxunlearn.audit.forgetting_quality import epsilons, forgetting_quality, forgetting_quality_ceiling


def column(*values):
    return np.array(values, float)[:, None]


A, B = column(1, 2, 3, 4), column(0, 0.5, 1.5, 2.5)


def test_epsilon_by_hand():
    # From 2 on: one of four is missed, one of four is wrongly called positive. What is 0 on one side does not count,
    # as from 3 on, where no other is above.
    expected = np.log(1 - 1e-5 - 0.25) - np.log(0.25)
    np.testing.assert_allclose(epsilons(A, B), expected)
    np.testing.assert_allclose(epsilons(B, A), expected)
    np.testing.assert_allclose(epsilons(-A, -B), expected)


def test_an_interval_tells_apart_what_no_threshold_does():
    around, within = column(-9, -8, -7, 7, 8, 9, 0, 0.1), column(-2, -1, -0.5, 0, 0.5, 1, 2, 9)
    # From -2 to 2 lie all but one of the narrow and two of the wide.
    (epsilon,) = epsilons(around, np.where(within == 9, 3, within))
    assert epsilon == pytest.approx(np.log(1 - 1e-5 - 0.25) - np.log(0.125))


def test_limits():
    np.testing.assert_array_equal(epsilons(A, A), [0])
    np.testing.assert_array_equal(epsilons(A, A + 10), [50])
    np.testing.assert_array_equal(epsilons(A, B / 1000), [50])  # one range under a hundredth of the other
    constant = column(-100, -100, -100, -100)
    np.testing.assert_array_equal(epsilons(constant, constant), [0])
    np.testing.assert_array_equal(epsilons(constant, A), [50])


def test_points_by_hand():
    unlearned, retrained = np.hstack([A, A, A]), np.hstack([B, A, A + 10])
    # ln 3 is in the third bucket: a quarter of a point; 0 has a whole one, 50 none.
    assert forgetting_quality(unlearned, retrained) == pytest.approx((0.25 + 1 + 0) / 3)
    # Of three models buckets end at ceil(ln 2) = 1: a third is missed, a quarter or a sixth wrongly called positive.
    assert epsilons(A[:3], B)[0] == pytest.approx(np.log(8 / 3), abs=1e-4)
    assert forgetting_quality(A[:3], B) == 0.5  # the second bucket
    more = column(0, 0.1, 0.2, 0.3, 0.5, 2.5)
    assert epsilons(A[:3], more)[0] == pytest.approx(np.log(4), abs=1e-4)
    assert forgetting_quality(A[:3], more) == 0  # the third is none of three models'
    assert forgetting_quality(A[:2], A[:2]) == 0  # of two, ceil(ln 1) = 0: there is none


def test_equal_distributions_come_to_the_ceiling_and_no_further():
    rng = np.random.default_rng(1)
    unlearned, retrained = rng.normal(size=(2, 32, 200))
    ceiling = forgetting_quality_ceiling(retrained)
    assert forgetting_quality(unlearned, retrained) == pytest.approx(ceiling, abs=0.03) and 0.1 < ceiling < 0.3
    assert forgetting_quality(unlearned + 1, retrained) < ceiling / 2
    assert forgetting_quality(unlearned + 8, retrained) == 0


@pytest.mark.parametrize(("deviation", "expected"), [(0.3, 0.10), (5, 0.20)])
def test_the_ceiling_is_that_of_margins_so_far_spread(deviation, expected):
    unlearned, retrained = np.random.default_rng(1).normal(size=(2, 32, 100)) * deviation
    ceiling = forgetting_quality_ceiling(retrained)
    assert ceiling == pytest.approx(expected, abs=0.015)
    assert forgetting_quality(unlearned, retrained) == pytest.approx(ceiling, abs=0.03)


def test_sides_may_be_of_different_size():
    np.testing.assert_allclose(epsilons(A, np.vstack([B, B])), epsilons(A, B))
