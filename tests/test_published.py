import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.registry import BASELINES, SUBMITTED
from jaxunlearn.results import published
from jaxunlearn.results.published import agreement, decision, log_density

VGG = "vgg16bn-cifar100-class0"
OFFICIAL = set(BENCHMARKS) - {"resnet20-digits-class0", "vgg16bn-cifar10-class0"}  # the others are ours


def test_the_file_is_consistent():
    facts = published.load()
    assert facts["columns"] == list(published.QUANTITIES) and set(facts["images"]) == OFFICIAL
    for bench in OFFICIAL:
        for row in published.rows_of(bench):
            retain, forget, area, score = row.values.values()
            assert score == pytest.approx((retain + 1 - forget + 1 - area) / 3, abs=1.51 * 10**-row.digits)
            assert all(value == round(value, row.digits) for value in row.values.values())


def test_every_rule_that_has_a_published_row_is_found_with_it():
    named = {row.rule for bench in OFFICIAL for row in published.rows_of(bench)} - {None}
    assert named == {*BASELINES, *SUBMITTED}
    assert published.rows_of("resnet20-digits-class0") == []
    labels = [row.label for row in published.rows_of(VGG) if row.name == "scrub"]
    assert labels == ["task table", "known fill"]


def test_a_rule_is_held_against_its_known_fill_and_a_submitted_one_against_the_agents_row():
    scrub, mask = (published.row_to_meet(VGG, name) for name in ("scrub", "importance_masked"))
    assert (scrub.label, scrub.digits, scrub.values["forget_mia_auc"]) == ("known fill", 4, 0.4648)
    assert (mask.label, mask.name, mask.values["retain_acc"]) == ("agent", "deepseek-reasoner", 0.089)
    assert published.row_to_meet(VGG, "salun") is None
    assert published.row_to_meet("mobilenetv2-fmnist-class0", "zeroed_logit") is None  # not published
    assert published.row_to_meet("mobilenetv2-fmnist-class0", "bad_teacher").broken


def test_one_more_run_may_lie_as_far_as_its_prediction_interval_says():
    # Of n + 1 values of one normal distribution the last is t-distributed about the mean of the others.
    ours = [0.45, 0.47, 0.46, 0.50]
    found = agreement(ours, 0.48, digits=4)
    scale = scipy.stats.sem(ours) * math.sqrt(len(ours) + 1)
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(ours), scale=scale)
    assert found.allowed == pytest.approx((high - low) / 2 + 0.00005, rel=1e-12)
    assert (found.seeds, found.difference, found.agrees) == (4, pytest.approx(-0.01), True)
    assert agreement(ours, high + 0.00004, 4).agrees and not agreement(ours, high + 0.00006, 4).agrees


def test_two_seeds_have_no_verdict_and_one_no_deviation():
    two, one = agreement([0.4, 0.5], 0.45, 3), agreement([0.4], 0.45, 3)
    assert (two.allowed, two.agrees, two.std) == (None, None, pytest.approx(0.1 / math.sqrt(2)))
    assert (one.std, one.allowed, one.difference) == (None, None, pytest.approx(-0.05))


def test_what_never_varies_agrees_with_what_rounds_to_it():
    assert agreement([0.0004] * 3, 0.0, digits=3).agrees and not agreement([0.0006] * 3, 0.0, digits=3).agrees


def test_the_log_density_is_that_of_students_t_and_integrates_to_one():
    ours = [0.45, 0.47, 0.49]
    floored = scipy.stats.t.logpdf(0.5, 2, loc=0.47, scale=0.03 * math.sqrt(4 / 3))
    assert log_density(ours, 0.5, floor=0.03) == pytest.approx(floored, rel=1e-12)
    own = scipy.stats.t.logpdf(0.5, 2, loc=0.47, scale=0.02 * math.sqrt(4 / 3))
    assert log_density(ours, 0.5, floor=0.01) == pytest.approx(own, rel=1e-12)
    total, _ = scipy.integrate.quad(lambda x: math.exp(log_density(ours, x, 0.01)), -np.inf, np.inf)
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("clean", "augmented", "what"),
    [(5.0, 2.6, "clean"), (2.6, 5.0, "augmented"), (5.0, 2.8, "undecided"), (-1.0, -1.0, "undecided")],
)
def test_a_reading_is_decided_by_a_factor_of_ten(clean, augmented, what):
    assert decision(clean, augmented) == what
