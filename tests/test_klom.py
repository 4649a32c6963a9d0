import numpy as np
import pytest

from jaxunlearn.audit.klom import klom, klom_floor, klom_percentile


def test_it_is_zero_for_the_same_and_at_its_limit_for_disjoint_margins():
    margins = np.random.default_rng(0).normal(size=(30, 5))
    np.testing.assert_array_equal(klom(margins, margins), np.zeros(5))
    np.testing.assert_array_equal(klom(np.full((8, 2), -100.0), np.full((8, 2), -100.0)), [0, 0])  # all in one bin
    np.testing.assert_allclose(klom(np.ones((30, 5)), np.zeros((30, 5))), np.log(1 + 1e5))


def test_two_bins_by_hand():
    unlearned, retrained = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([[0.0], [1.0], [1.0], [1.0]])
    # .5 ln(.5 / .25) + .5 ln(.5 / .75); the largest margin is in the last bin.
    np.testing.assert_allclose(klom(unlearned, retrained), 0.143841, atol=2e-5)
    np.testing.assert_allclose(klom(7 * unlearned - 3, 7 * retrained - 3), klom(unlearned, retrained))


def test_examples_do_not_touch_each_other():
    rng = np.random.default_rng(0)
    unlearned, retrained = rng.normal(size=(2, 20, 6))
    together = klom(unlearned, retrained)
    np.testing.assert_array_equal([klom(unlearned[:, [i]], retrained[:, [i]])[0] for i in range(6)], together)


def test_few_models_never_come_near_zero():
    assert klom_floor(32) == pytest.approx(3.0, abs=0.3) and klom_floor(200) < 0.4 < klom_floor(100) < klom_floor(64)
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(size=300))  # how wide margins are spread does not matter
    never = klom_percentile(*rng.normal(size=(2, 32, 300)) * scale)
    assert never == pytest.approx(klom_floor(32), rel=0.15)
    assert klom_percentile(rng.normal(3, 1, (32, 300)), rng.normal(0, 1, (32, 300))) > 2 * klom_floor(32)
