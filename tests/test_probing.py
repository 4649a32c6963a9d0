import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jaxunlearn.evaluation.probing import probe_accuracy

TRUTH = np.arange(120) % 4 == 0


def features(rng, rows, shift=0.0, width=6):
    """Normal ones, of which the first is shifted."""
    drawn = rng.normal(size=(rows, width))
    drawn[:, 0] += shift
    return drawn.astype(np.float32)


def sets(shift, seed=0):
    rng = np.random.default_rng(seed)
    forget, retain, test = features(rng, 60, shift), features(rng, 90), features(rng, 120)
    test[TRUTH, 0] += shift
    return forget, retain, test


def test_a_class_that_stands_apart_is_found():
    assert probe_accuracy(*sets(20.0), TRUTH) == 1
    assert 0.7 < probe_accuracy(*sets(2.0), TRUTH) < 0.95
    assert probe_accuracy(*sets(0.0), TRUTH) == pytest.approx(0.5, abs=0.1)


def test_accuracy_is_balanced():
    forget, retain, test = sets(2.0)
    accuracy = probe_accuracy(forget, retain, test, TRUTH)
    # Each kind counts one half, however many there are of it.
    others = np.repeat(test[~TRUTH], 7, axis=0)
    truth = np.repeat([True, False], [TRUTH.sum(), len(others)])
    assert probe_accuracy(forget, retain, np.concatenate([test[TRUTH], others]), truth) == pytest.approx(accuracy)


def test_units_do_not_matter():
    forget, retain, test = sets(1.5)
    scale, shift = 2.0 ** np.arange(-30, 30, 10), np.float64([0, 5, 0, 0, 0, 9])
    moved = [part.astype(np.float64) * scale + shift for part in (forget, retain, test)]
    assert probe_accuracy(*moved, TRUTH) == probe_accuracy(forget, retain, test, TRUTH)


def test_retained_images_are_taken_from_everywhere():
    # Sorted by class, of which the first looks like the forgotten one: alone it would make both the same.
    rng = np.random.default_rng(1)
    forget, alike, unlike = features(rng, 30, 9.0), features(rng, 30, 9.0), features(rng, 270)
    test, truth = np.concatenate([features(rng, 50, 9.0), features(rng, 50)]), np.repeat([True, False], 50)
    assert probe_accuracy(forget, np.concatenate([alike, unlike]), test, truth) > 0.95


def test_fewer_retained_images_weigh_more():
    rng = np.random.default_rng(2)
    forget, test = features(rng, 400, 1.0), features(rng, 400)
    truth = np.arange(400) % 2 == 0
    test[truth, 0] += 1
    few = features(rng, 40)
    accuracy = probe_accuracy(forget, few, test, truth)
    assert accuracy == pytest.approx(0.69, abs=0.06)  # Phi(1/2); .5 if the ten times more decided


@pytest.mark.parametrize(
    "value", [np.zeros(6), np.full(6, 0.1), np.full(6, 1e30)], ids=["dead", "constant", "constant and large"]
)
def test_constant_features_tell_nothing(value):
    same = [np.tile(value.astype(np.float32), (rows, 1)) for rows in (60, 90, 120)]
    assert probe_accuracy(*same, TRUTH) == 0.5


def test_features_of_a_collapsed_model():
    # One direction, some dead, some of another order of magnitude: converged, without a warning.
    rng = np.random.default_rng(3)
    direction = np.concatenate([np.zeros(20), np.exp(rng.normal(size=44) * 8)])
    parts = [np.exp(rng.normal(size=(rows, 1)) * 3) * direction for rows in (300, 500, 120)]
    assert probe_accuracy(*parts, TRUTH) == pytest.approx(0.5, abs=0.15)
    assert probe_accuracy(*parts, TRUTH) == probe_accuracy(*parts, TRUTH)


def test_another_solver_finds_the_same():
    # Heavy tails, which take the most steps.
    rng = np.random.default_rng(4)
    train, test = (np.exp(rng.normal(size=(rows, 20)) * 4) for rows in (600, 2000))
    truth = np.arange(2000) % 2 == 0
    of_forget = np.repeat([True, False], 300)
    scaler = StandardScaler().fit(train)
    other = LogisticRegression(solver="newton-cholesky", tol=1e-9).fit(scaler.transform(train), of_forget)
    right = other.predict(scaler.transform(test)) == truth
    assert probe_accuracy(train[:300], train[300:], test, truth) == pytest.approx(right.mean(), abs=1e-3)


@pytest.mark.parametrize("truth", [np.zeros(120, bool), np.ones(120, bool), TRUTH[:-1]])
def test_it_needs_both_kinds_of_test_images(truth):
    with pytest.raises(ValueError, match="rows of the forgotten class and of others"):
        probe_accuracy(*sets(1.0), truth)


def test_it_needs_finite_features_of_both():
    forget, retain, test = sets(1.0)
    with pytest.raises(ValueError):
        probe_accuracy(forget * math.nan, retain, test, TRUTH)
    with pytest.raises(ValueError):
        probe_accuracy(forget, retain[:0], test, TRUTH)
