"""What is known of three models comes out of the companions: nothing was forgotten, only hidden, never learned."""

import pytest

import jaxunlearn
from jaxunlearn.evaluation.metrics import auc_standard_error

pytestmark = pytest.mark.slow
ERROR = auc_standard_error(142, 36)  # of the digits' zeros


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By seed: what is said of the untouched model, of it behind an output mask, and of a retrained one."""
    folder = tmp_path_factory.mktemp("references")
    records = jaxunlearn.run(
        "resnet20-digits-class0",
        "output_mask",
        seeds=(42, 1),
        evaluate="full",
        cache_dir=folder / "cache",
        out=folder / "runs",
        devices=1,
        quiet=True,
    )
    assert [record["method"] for record in records] == ["retrain"] * 2 + ["output_mask"] * 2  # the first unasked
    return [(records[i]["before"], records[2 + i], records[i]) for i in (0, 1)]


def test_an_untouched_model_has_forgotten_nothing(references):
    for untouched, _, _ in references:
        beside = untouched["companions"]
        assert untouched["forget_acc"] > 0.95 and beside["forget_train_acc"] > 0.95
        assert all(area > 0.5 - 3 * ERROR for area in beside["attacks"].values())
        gaps = beside["against_retrain"]["gaps"]
        assert min(gaps["forget_train"], gaps["forget_test"]) > 0.95 > 0.05 > gaps["retain_test"]
        assert beside["against_retrain"]["tug_of_war"] < 0.05 and beside["against_retrain"]["js"] > 0.6
        assert beside["full"]["probe_excess"] > 0 and beside["full"]["relearn_ratio"] > 1
        assert beside["mask_divergence"] > 0.5


def test_an_output_mask_hides_the_class_and_erases_nothing(references):
    for untouched, mask, _ in references:
        assert mask["forget_acc"] == mask["companions"]["forget_train_acc"] == 0 and mask["status"] == "ok"
        assert mask["flags"]["output_mask"] and not mask["flags"]["collapsed"]
        for name in ("probe_acc", "probe_excess", "relearning", "relearn_ratio"):
            assert mask["companions"]["full"][name] == untouched["companions"]["full"][name]
        assert mask["companions"]["against_retrain"]["tug_of_war"] > 0.95  # which it fools


def test_two_retrained_models_are_as_near_as_seeds_are(references):
    for (untouched, _, retrained), (_, _, other) in zip(references, reversed(references), strict=True):
        beside = retrained["companions"]
        assert retrained["forget_acc"] == beside["forget_train_acc"] == 0
        assert beside["against_retrain"]["seed"] == other["seed"]
        assert max(beside["against_retrain"]["gaps"].values()) < 0.05 and beside["against_retrain"]["tug_of_war"] > 0.95
        assert beside["against_retrain"]["js"] < 0.3 < untouched["companions"]["against_retrain"]["js"]
        assert all(abs(area - 0.5) < 4 * ERROR for area in beside["attacks"].values())
        assert abs(beside["full"]["probe_excess"]) < 0.05 and 0.6 < beside["full"]["relearn_ratio"] < 1.7
        assert not any(retrained["flags"][name] for name in ("collapsed", "inverted_membership", "output_mask"))
