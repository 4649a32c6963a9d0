import pytest

from jaxunlearn.evaluation.flags import MASK, flags
from jaxunlearn.evaluation.metrics import auc_standard_error

COUNTS = (500, 100)  # a standard error of .0316


def model(retain=0.9, area=0.5, score=0.8, mask=0.3):
    companions = {"mask_divergence": mask}
    return {"retain_acc": retain, "forget_mia_auc": area, "unlearn_score": score, "companions": companions}


@pytest.mark.parametrize(("after", "collapsed"), [(0.79, True), (0.81, False), (0.95, False)])
def test_collapse_is_ten_points_of_retained_accuracy(after, collapsed):
    assert flags(model(retain=0.9), model(retain=after), None, *COUNTS)["collapsed"] is collapsed
    assert flags(model(retain=None), model(retain=after), None, *COUNTS)["collapsed"] is None


def test_membership_is_inverted_two_standard_errors_below_one_half_and_below_retrain():
    low = 0.5 - 2 * auc_standard_error(*COUNTS)
    for area, there, inverted in (
        (low - 0.01, 0.5, True),
        (low + 0.01, 0.5, False),
        (low - 0.01, low - 0.02, False),  # a model that never saw the class is as low
        (low + 0.01, None, False),
        (low - 0.01, None, None),
    ):
        retrained = None if there is None else model(area=there)
        assert flags(model(), model(area=area), retrained, *COUNTS)["inverted_membership"] is inverted


def test_a_score_above_that_of_retraining_is_marked():
    for score, above in ((0.81, True), (0.8, False)):
        assert flags(model(), model(score=score), model(score=0.8), *COUNTS)["above_retrain"] is above
    assert flags(model(), model(), None, *COUNTS)["above_retrain"] is None


def test_what_answers_like_the_pretrained_model_without_the_class_is_an_output_mask():
    for divergence, mask in ((0.0, True), (MASK, False), (0.5, False), (None, None)):
        assert flags(model(), model(mask=divergence), None, *COUNTS)["output_mask"] is mask


def test_of_a_diverged_model_nothing_is_said():
    diverged = {"retain_acc": None, "forget_mia_auc": None, "unlearn_score": None, "companions": None}
    assert set(flags(model(), diverged, model(), *COUNTS).values()) == {None}
