"""How well a score tells unlearned models from retrained ones, over all pairs of a model and an example.

Pairs of one model are not independent: what makes it sure of one image makes it sure of others. Intervals are
therefore over models, the clusters in which pairs come, and never over pairs.
"""

import math
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

LEVEL = 0.95
FPR = 0.01  # at which the share that is caught is reported
CURVE = np.logspace(-4, 0, 33)  # false positive rates of a curve: eight a decade


def separation(
    unlearned: np.ndarray, retrained: np.ndarray, threshold: float | None = None, folds: int = 1
) -> dict[str, Any]:
    """What a score tells apart, as JSON values.

    `auc`: how often a pair of an unlearned model scores above one of a retrained model, ties half. `tpr`: the share of
    unlearned models' pairs above the lowest threshold that at most 1% of retrained models' pairs exceed; what ties with
    that threshold is not caught. `balanced_accuracy`: of calling unlearned what scores above `threshold`, if one is
    given. `curve`: what `tpr` is at each false positive rate of `CURVE`.

    Each is a mean over models of a model's share, so its standard error is that of a mean: of the sums of an unlearned
    and a retrained model's parts, which stand in one row since they may share an initialisation. For the area that is
    Obuchowski's estimate for clustered curves (Biometrics 53, 1997); `tpr`'s has the slope of the curve for the
    threshold's own error. `*_half_width` is half the 95% t-interval. `tpr_interval` is Korn and Graubard's (Survey
    Methodology 24, 1998): Clopper and Pearson's with the number of independent trials that would have this error, and
    with the number of models where all or none is caught.

    Models that are scored by fits to other folds share these fits, and are no N independent ones: the variance of a
    mean over models is then 1 + K / (K - 1) times that of independent ones, by Nadeau and Bengio (Machine Learning 52,
    2003), whose ratio of tested to fitted models is 1 / (K - 1) of K folds.

    Args:
      unlearned: float[N, F] scores of F examples by N models, N >= 2, finite; higher is more like unlearned.
      retrained: float[N, F], those of retrained models.
      threshold: the score's own, if it has one.
      folds: K, of which each was scored by a fit to the others; 1: no model had a part in any score of another.
    """
    models, low, high = len(unlearned), np.sort(retrained, axis=None), np.sort(unlearned, axis=None)
    above_retrained = _share_below(low, unlearned)
    below_unlearned = 1 - _share_below(high, retrained)
    area = float(above_retrained.mean())
    caught = {rate: float((unlearned > _threshold(low, rate)).mean()) for rate in (FPR / 2, FPR, 3 * FPR / 2)}
    slope = (caught[3 * FPR / 2] - caught[FPR / 2]) / FPR
    at = _threshold(low, FPR)
    longer = math.sqrt(1 + folds / (folds - 1)) if folds > 1 else 1.0  # than errors of models without shared fits
    error = longer * _standard_error((unlearned > at).mean(1) - slope * (retrained > at).mean(1))
    found = {
        "auc": area,
        "auc_half_width": longer * _half_width(above_retrained.mean(1) + below_unlearned.mean(1)),
        "tpr": caught[FPR],
        "tpr_interval": list(_share_interval(caught[FPR], error, models, unlearned.size)),
        "curve": [float((unlearned > _threshold(low, rate)).mean()) for rate in CURVE],
    }
    if threshold is not None:
        right = ((unlearned > threshold).mean(1) + (retrained <= threshold).mean(1)) / 2
        found |= {
            "balanced_accuracy": float(right.mean()),
            "balanced_accuracy_half_width": longer * _half_width(right),
        }
    return found


def _share_below(ordered: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of each score, the share of `ordered` that it is above, ties half."""
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2 * ordered.size)


def _threshold(ordered: np.ndarray, rate: float) -> float:
    """The lowest that at most this share of `ordered`, all of it for 1, exceeds."""
    exceed = int(rate * ordered.size + 1e-9)
    return float(ordered[-1 - exceed]) if exceed < ordered.size else -np.inf


def _standard_error(parts: np.ndarray) -> float:
    return float(parts.std(ddof=1) / np.sqrt(len(parts)))


def _half_width(parts: np.ndarray) -> float:
    return float(stdtrit(len(parts) - 1, (1 + LEVEL) / 2) * _standard_error(parts))


def _share_interval(share: float, error: float, models: int, pairs: int) -> tuple[float, float]:
    """Korn and Graubard's interval of a share with this standard error."""
    tail = (1 - LEVEL) / 2
    if 0 < share < 1:
        ratio = ndtri(1 - tail) / stdtrit(models - 1, 1 - tail)
        trials = min(pairs, share * (1 - share) / max(error, 1e-12) ** 2 * ratio**2)
    else:
        trials = models
    hits = share * trials
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return low, high
