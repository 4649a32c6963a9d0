"""One number for what a model says of an image: how sure it is, on a scale on which models are spread normally.

Log-probabilities are float[N, C], of any dtype; minus infinity is a probability of zero.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

CLIP = 100.0  # of margins, either way: an answer that is ruled out, or that nothing stands against, is finite too


def true_class_margin(log_p: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """phi = log p_y - log sum_{j != y} p_j of each image, f64[N], clipped at 100 (Carlini et al., arXiv 2112.03570).

    Args:
      log_p: float[N, C].
      labels: y, int[N].
    """
    values = np.array(log_p, np.float64)
    return _margin(values, np.asarray(labels))


def retained_margin(log_p: ArrayLike, forget_class: int) -> np.ndarray:
    """The same of the most probable class, among the classes without `forget_class` alone, f64[N].

    A rule that sinks the forgotten class's logit and does nothing else is far from retrained models by the margin of
    the true class. This one does not see that logit: it says what else tells the images apart.

    Args:
      log_p: float[N, C], at least three classes.
      forget_class: the one to leave out.
    """
    values = np.delete(np.asarray(log_p, np.float64), forget_class, axis=1)
    return _margin(values, values.argmax(axis=1))


def log_confidence(margin: np.ndarray) -> np.ndarray:
    """log p of a margin log p - log(1 - p), of the same shape."""
    return -np.logaddexp(0, -margin)


def _margin(log_p: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of the `chosen` column of each row; `log_p` is written over."""
    rows = np.arange(len(log_p))
    own = log_p[rows, chosen]
    log_p[rows, chosen] = -np.inf
    return (own - logsumexp(log_p, axis=1)).clip(-CLIP, CLIP)
