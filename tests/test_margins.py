import numpy as np
import pytest

from jaxunlearn.audit.margins import CLIP, log_confidence, retained_margin, true_class_margin

LOG_P = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])


def test_margins_are_log_odds():
    np.testing.assert_allclose(true_class_margin(LOG_P, [0, 2]), np.log([0.7 / 0.3, 0.3 / 0.7]))
    np.testing.assert_allclose(np.exp(log_confidence(np.log(np.array([0.7 / 0.3, 0.3 / 0.7])))), [0.7, 0.3])


def test_the_retained_margin_does_not_see_the_forgotten_class():
    np.testing.assert_allclose(retained_margin(LOG_P, 0), np.log([0.2 / 0.1, 0.6 / 0.3]))
    masked = LOG_P + np.array([-np.inf, 0, 0])  # an output mask, before it is normalised
    np.testing.assert_allclose(retained_margin(masked, 0), retained_margin(LOG_P, 0))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_what_is_certain_or_ruled_out_is_finite(dtype):
    log_p = np.array([[-np.inf, np.log(0.5), np.log(0.5)], [0, -65504, -65504]], dtype)
    np.testing.assert_array_equal(true_class_margin(log_p, [0, 0]), [-CLIP, CLIP])
    assert np.isfinite(log_confidence(true_class_margin(log_p, [0, 0]))).all()
    assert np.isneginf(log_p[0, 0]) and np.isfinite(log_p[0, 1:]).all()  # what is given is not written over
