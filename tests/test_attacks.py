import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import bootstrap, norm
from sklearn.metrics import roc_auc_score, roc_curve

from jaxunlearn.evaluation import attacks
from jaxunlearn.evaluation.metrics import mann_whitney_auc

INF = math.inf


def logits_of(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)) + 3


def test_areas_by_hand():
    # True class 0. Modified entropies: .162, 3.370, 1.100 of the members, .498, 1.696, .938 of the others; entropies
    # .802, .639, .673 and 1.030, 1.055, 1.097.
    members = logits_of((0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.4, 0.6, 0.0))
    others = logits_of((0.5, 0.3, 0.2), (0.2, 0.4, 0.4), (0.35, 0.325, 0.325))
    areas = attacks.attack_areas(members, others, 0)
    assert tuple(areas) == attacks.ATTACKS
    assert areas == {
        "confidence": 1,
        "entropy": 1,
        "modified_entropy": (3 + 0 + 1) / 9,
        "true_probability": (3 + 0 + 2) / 9,
    }


@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_areas_are_those_of_the_formulas(label, masked):
    rng = np.random.default_rng(0)
    members, others = (rng.normal(size=(n, 5)).astype(np.float32) * 2 for n in (80, 40))
    members[:, label] += 3
    if masked:
        members[:, 1] = others[:, 1] = -INF

    def scores(logits):
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        false = np.delete(p, label, axis=1)
        log_p = np.log(np.maximum(p, 1e-300))
        return {
            "confidence": p.max(axis=1),
            "entropy": (p * log_p).sum(axis=1),
            "modified_entropy": (1 - p[:, label]) * log_p[:, label] + (false * np.log(1 - false)).sum(axis=1),
            "true_probability": p[:, label],
        }

    of_members, of_others = scores(members), scores(others)
    areas = attacks.attack_areas(members, others, label)
    is_member = np.arange(120) < 80
    expected = {
        name: roc_auc_score(is_member, np.append(of_members[name], of_others[name])) for name in attacks.ATTACKS
    }
    assert areas == pytest.approx(expected, abs=1e-12)
    assert areas["true_probability"] > 0.6


@pytest.mark.parametrize("pair", [((80, 0, 0), (75, 0, 0)), ((200, 0, -INF), (150, 0, -INF))])
def test_probabilities_that_round_to_one_are_told_apart(pair):
    areas = attacks.attack_areas([pair[0]], [pair[1]], 0)
    assert set(areas.values()) == {1.0}
    # Wrong, and as sure of it: certain to be a member for whoever does not know the class.
    areas = attacks.attack_areas([pair[0]], [pair[1]], 1)
    assert areas == {"confidence": 1, "entropy": 1, "modified_entropy": 0, "true_probability": 0}


def test_what_the_largest_probability_lacks_counts():
    # One other class with e = exp(-60) gives 2 e^2; nine with 1.4 e together 1.96 e^2 + .22 e^2.
    one, nine = [60, 0, *[-INF] * 8], [60, *[math.log(1.4 / 9)] * 9]
    assert attacks.attack_areas([one], [nine], 0)["modified_entropy"] == 1


def test_a_masked_true_class_reveals_nothing_by_its_probability():
    rng = np.random.default_rng(1)
    members, others = rng.normal(size=(50, 4)) * 3, rng.normal(size=(30, 4))
    members[:, 2] = others[:, 2] = -INF
    areas = attacks.attack_areas(members, others, 2)
    assert areas["true_probability"] == areas["modified_entropy"] == 0.5
    assert min(areas["confidence"], areas["entropy"]) > 0.7
    # Only one class is left: all are certain, and tie.
    assert set(attacks.attack_areas(members[:, 1:3], others[:, 1:3], 1).values()) == {0.5}
    assert set(attacks.attack_areas(members[:, 1:3], others[:, 1:3], 0).values()) == {0.5}


def test_a_model_with_one_answer_gives_one_half():
    same = np.tile(np.float32([0.3, 0.1, -2]), (40, 1))
    assert set(attacks.attack_areas(same[:30], same[30:], 1).values()) == {0.5}


@pytest.mark.parametrize("bad", [[[math.nan, 0.0]], [[INF, 0.0]], [[-INF, -INF]], [], [0.5]])
def test_areas_reject(bad):
    with pytest.raises(ValueError, match="logits must be"):
        attacks.attack_areas(bad, [[0.0, 0.0]], 0)
    with pytest.raises(ValueError, match="logits must be"):
        attacks.attack_areas([[0.0, 0.0]], bad, 0)


@pytest.mark.parametrize("digits", [1, 6])  # with ties, and without
@pytest.mark.parametrize("block", [1, attacks.BLOCK])
def test_the_interval_is_scipys(monkeypatch, digits, block):
    monkeypatch.setattr(attacks, "BLOCK", block)
    rng = np.random.default_rng(2)
    members, others = rng.normal(0.5, 1, 120).round(digits), rng.normal(0, 1, 60).round(digits)
    low, high = attacks.bootstrap_interval(members, others)
    assert low < mann_whitney_auc(members, others) < high
    theirs = bootstrap(
        (members, others), mann_whitney_auc, n_resamples=1000, method="percentile", vectorized=False, rng=rng
    )
    assert (low, high) == pytest.approx(theirs.confidence_interval, abs=0.3 * theirs.standard_error)
    assert attacks.bootstrap_interval(members, others) == (low, high)
    narrow = attacks.bootstrap_interval(members, others, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    once = attacks.bootstrap_interval(members, others, draws=1)
    assert once[0] == once[1]


def test_the_interval_covers_the_truth():
    rng, truth = np.random.default_rng(3), norm.cdf(0.5 / math.sqrt(2))
    covered = 0
    for _ in range(300):
        low, high = attacks.bootstrap_interval(rng.normal(0.5, 1, 60), rng.normal(0, 1, 40), draws=200)
        covered += low <= truth <= high
    assert 0.92 <= covered / 300 <= 0.975  # .95, with three deviations of .0126 and what a percentile lacks


def test_the_interval_takes_little_memory():
    rng = np.random.default_rng(4)
    members, others = rng.random(5000), rng.random(1000)
    tracemalloc.start()
    attacks.bootstrap_interval(members, others)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_intervals_of_what_cannot_vary():
    assert attacks.bootstrap_interval([2, 3, 4], [0, 1]) == (1, 1)
    assert attacks.bootstrap_interval([0.5] * 9, [0.5] * 4) == (0.5, 0.5)
    for bad in ([], [math.nan], [[0.5]]):
        with pytest.raises(ValueError, match="must be"):
            attacks.bootstrap_interval(bad, [0.5])


def test_the_support_vector_machine_takes_equal_sizes_from_the_front():
    known, unknown = np.linspace(0.8, 0.9, 20), np.linspace(0.2, 0.3, 20)
    forgotten = [0.85, 0.86, 0.21, 0.25, 0.29]
    assert attacks.svc_attack(known, unknown, forgotten) == 0.6
    # What is beyond the shorter is not looked at, on either side.
    assert attacks.svc_attack([*known, *np.full(200, 0.25)], unknown, forgotten) == 0.6
    assert attacks.svc_attack(known, [*unknown, *np.full(200, 0.85)], forgotten) == 0.6


def test_the_support_vector_machine_on_one_value():
    assert attacks.svc_attack(np.full(30, 0.1), np.full(20, 0.1), np.full(10, 0.1)) in (0, 1)
    for bad in ([], [math.nan], [[0.5]]):
        with pytest.raises(ValueError, match="must be"):
            attacks.svc_attack([0.5], [0.5], bad)


def test_histogram():
    counts = attacks.histogram(np.float32([0, 0.049, 0.06, 0.999, 1, 1]))
    assert counts == [2, 1, *[0] * 17, 3]
    assert all(type(count) is int for count in counts)
    for bad in ([1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            attacks.histogram(bad)


def test_the_curve_by_hand():
    curve = attacks.roc([3, 1, 1], [2, 1])
    # Above 2 lies 3; 2 is a non-member; at 1 two members tie with the other.
    assert curve[:51] == [0.3333] * 51 and curve[75] == 0.6667 and curve[100] == 1
    assert attacks.roc([2, 2], [1, 1]) == [1] * 101 and attacks.roc([1] * 5, [1] * 7) == [k / 100 for k in range(101)]


@pytest.mark.parametrize(("members", "others", "digits"), [(500, 100, 2), (40, 139, 8), (3, 1000, 8)])
def test_the_curve_is_scikit_learns(members, others, digits):
    rng = np.random.default_rng(members)
    scores = rng.normal(0.3, 1, members).round(digits), rng.normal(0, 1, others).round(digits)
    labels = np.repeat([1, 0], [members, others])
    false, true, _ = roc_curve(labels, np.concatenate(scores), drop_intermediate=False)
    highest = {rate: caught for rate, caught in zip(false, true, strict=True)}  # of a rate, the last is the highest
    curve = attacks.roc(*scores)
    for k in range(101):
        rate = k / 100
        wanted = highest.get(rate, np.interp(rate, false, true))
        assert curve[k] == pytest.approx(wanted, abs=6e-5)
    area = np.trapezoid(curve, dx=0.01)
    assert area == pytest.approx(mann_whitney_auc(*scores), abs=0.01)


@pytest.mark.parametrize("others", [58, 100, 139, 1000])
def test_the_curve_is_exact_where_rates_are_whole(others):
    members = np.full(10, others // 2 - 0.5)  # above all others but the upper half
    assert attacks.roc(members, np.arange(others))[50] == (1 if others % 2 == 0 else 0)


@pytest.mark.parametrize("bad", [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([[1.0]], [1.0])])
def test_no_curve_of_no_scores(bad):
    with pytest.raises(ValueError):
        attacks.roc(*bad)
