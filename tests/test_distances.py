import math

import numpy as np
import pytest
from scipy.spatial import distance
from scipy.special import softmax

from jaxunlearn.evaluation import distances

INF = math.inf
OWN = {"retain_train": 0.9, "forget_train": 0.2, "retain_test": 0.8, "forget_test": 0.1}
REFERENCE = {"retain_train": 1.0, "forget_train": 0.0, "retain_test": 0.85, "forget_test": 0.0}


def test_jensen_shannon_is_scipys_distance_squared():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 7)).astype(np.float32) * 3
    a[:, 2] = -INF
    theirs = distance.jensenshannon(softmax(a.astype(float), 1), softmax(b.astype(float), 1), axis=1) ** 2
    assert distances.jensen_shannon(a, b) == pytest.approx(theirs.mean(), abs=1e-12)
    assert distances.jensen_shannon(b, a) == distances.jensen_shannon(a, b)


def test_equal_answers_are_at_no_distance():
    logits = np.random.default_rng(1).normal(size=(20, 5)) * 4
    logits[:, 1] = -INF
    for function in (distances.jensen_shannon, distances.activation_distance):
        assert function(logits, logits) == 0
        assert 0 <= function(logits, logits + 0.1) < 1e-12  # which changes no softmax but by rounding


def test_disjoint_answers_are_as_far_as_can_be():
    a, b = np.zeros((9, 4)), np.zeros((9, 4))
    a[:, :2], b[:, 2:] = -INF, -INF
    assert distances.jensen_shannon(a, b) == pytest.approx(math.log(2), abs=1e-15)
    assert distances.activation_distance(a, b) == pytest.approx(1)  # two halves each: 4 of .5 squared
    a[:, 2], b[:, 0] = -INF, -INF
    assert distances.jensen_shannon(a, b) == math.log(2)
    assert distances.activation_distance(a, b) == pytest.approx(math.sqrt(2))


def test_rounding_oversteps_no_bound():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 200, 9))
    near = [distances.jensen_shannon([row], [row + 1e-9 * move]) for row, move in zip(a, b, strict=True)]
    a[:, :4], b[:, 4:] = -INF, -INF
    far = [distances.jensen_shannon([row], [other]) for row, other in zip(a, b, strict=True)]
    assert min(near) >= 0 and max(far) <= math.log(2) <= min(far) + 1e-15


def test_activation_distance_by_hand():
    a, b = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), np.log([[0.5, 0.25, 0.25], [0.5, 0.3, 0.2]])
    assert distances.activation_distance(a, b) == pytest.approx((0 + 0.3 * math.sqrt(2)) / 2)


@pytest.mark.parametrize("function", [distances.jensen_shannon, distances.activation_distance])
def test_what_cannot_be_compared(function):
    fine = np.zeros((2, 3))
    for bad in ([[math.nan, 0, 0]] * 2, [[INF, 0, 0]] * 2, [[-INF] * 3] * 2, np.zeros((0, 3)), [0.0, 1.0]):
        with pytest.raises(ValueError, match="logits must be"):
            function(fine, bad)
    with pytest.raises(ValueError, match="same images"):
        function(fine, np.zeros((1, 3)))


def test_without_class_is_an_output_mask():
    logits = np.float32([[1, 2, 3], [3, 2, 1]])
    masked = distances.without_class(logits, 0)
    assert masked.tolist() == [[-INF, 2, 3], [-INF, 2, 1]]
    assert masked.dtype == np.float32 and logits[0, 0] == 1
    # The softmax of a mask is the rest's, as if the class had never been there.
    assert np.exp(distances.log_probabilities(masked))[:, 1:] == pytest.approx(softmax(logits[:, 1:], 1))


def test_gaps_have_no_sign_and_all_four_sets():
    differences = distances.gaps(OWN, REFERENCE | {"name": 1})
    assert differences == pytest.approx(
        {"retain_train": 0.1, "forget_train": 0.2, "retain_test": 0.05, "forget_test": 0.1}
    )
    assert tuple(differences) == distances.COMPARED


def test_average_gap_by_hand():
    # UA .8 and 1, RA .9 and 1, TA .8 and .85, area .45 and .5.
    assert distances.average_gap(OWN, REFERENCE, 0.45, 0.5) == pytest.approx((0.2 + 0.1 + 0.05 + 0.05) / 4)
    assert distances.average_gap(OWN, OWN | {"forget_test": 1.0}, 0.45, 0.45) == 0


def test_tug_of_war_by_hand():
    assert distances.tug_of_war(OWN, REFERENCE) == pytest.approx(0.8 * 0.9 * 0.95)
    assert distances.tug_of_war(OWN, OWN | {"forget_test": 1.0}) == 1
    assert distances.tug_of_war(OWN | {"forget_train": 1.0}, REFERENCE) == 0
