"""Forgetting quality: how well one example tells unlearned models from retrained ones, as an epsilon of privacy.

The measure of the first unlearning challenge (Triantafillou et al., arXiv 2406.09073), which is defined on unlearnings
of one original. Here it is on one unlearning of each of N originals, which is a variant, and named so in records.
"""

from functools import cache

import numpy as np

DELTA = 1e-5
LARGEST = 50.0  # epsilon
PEAKED = 0.01  # a range that is this much narrower than the other is told apart as such
BUCKET = 0.5  # of epsilon, from which to which an example gets half the points
REACH = 2.0  # by how much an interval may be wider or narrower than the narrower range
SIMULATED = 500  # examples of the ceiling


def forgetting_quality(unlearned: np.ndarray, retrained: np.ndarray) -> float:
    """The mean over examples of 2^-floor(eps / .5), nothing where that bucket ends beyond ceil(ln(N - 1)).

    1 is as if retrained, but thresholds are chosen on the models that they judge, so that is out of reach:
    `forgetting_quality_ceiling` says what is not. Multiplied by the ratios of accuracies, unlearned over retrained, on
    retained training images and on test images it is the challenge's score.

    Args:
      unlearned: f64[N, F] margins of F examples by N models, finite.
      retrained: f64[M, F]. The smaller of N and M decides which points there are.
    """
    models = min(len(unlearned), len(retrained))
    most = np.ceil(np.log(models - 1)) if models > 1 else 0.0
    bucket = np.floor(epsilons(unlearned, retrained) / BUCKET)
    return float(np.where((bucket + 1) * BUCKET <= most, 0.5**bucket, 0).mean())


def forgetting_quality_ceiling(retrained: np.ndarray) -> float:
    """What `forgetting_quality` gives where both are spread alike: simulated, of normals with retrained models'
    deviations, on which it depends, since intervals differ from the narrower range by a fixed 2 at most.

    Args:
      retrained: f64[N, F] margins, N >= 2: as many on either side.
    """
    spread = np.quantile(retrained.std(axis=0, ddof=1), np.linspace(0, 1, SIMULATED))
    draws = np.random.default_rng(0).normal(size=(2, len(retrained), SIMULATED))
    return forgetting_quality(*(draws * spread))


def epsilons(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """Epsilon of each example, f64[F], from 0 to 50.

    The largest over decision rules of

        max(ln(1 - d - FPR) - ln FNR, ln(1 - d - FNR) - ln FPR),    d = 1e-5,

    with the quirks of the published code: a rule where exactly one of FPR and FNR is 0 does not count (else equal
    distributions would give 50), one where both are gives 50, and so does a range under 1% of the other. Rules are
    single thresholds, above which lie the models with the larger median, and intervals, in which lie those with the
    narrower range, no wider or narrower than that by more than 2 and beginning or ending no further than that beyond
    it. The published code tries thresholds of a grid with a step of .01 and intervals with a step of .01; here they are
    all that tell these models apart differently, which is what a fine grid comes to.

    Args:
      unlearned: f64[N, F] margins, finite.
      retrained: f64[M, F].
    """
    tables = {
        swapped: _table(*((len(retrained), len(unlearned)) if swapped else (len(unlearned), len(retrained))))
        for swapped in (False, True)
    }
    return np.array([_epsilon(u, r, tables) for u, r in zip(unlearned.T, retrained.T, strict=True)])


def _epsilon(unlearned: np.ndarray, retrained: np.ndarray, tables: dict[bool, np.ndarray]) -> float:
    narrow, wide = sorted([np.ptp(unlearned), np.ptp(retrained)])
    if narrow < PEAKED * wide:
        return LARGEST
    swapped = bool(np.median(retrained) > np.median(unlearned))
    found = _of_thresholds(*_by_value(unlearned, retrained, swapped), tables[swapped])
    swapped = bool(np.ptp(unlearned) >= np.ptp(retrained))
    return max(found, _of_intervals(*_by_value(unlearned, retrained, swapped), narrow, tables[swapped]))


def _by_value(unlearned: np.ndarray, retrained: np.ndarray, swapped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct values f64[V] in order, and how many positives and negatives lie below each and all, i64[V + 1]."""
    positive, negative = (retrained, unlearned) if swapped else (unlearned, retrained)
    values, places = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    counts = (np.bincount(part, minlength=len(values)) for part in np.split(places, [len(positive)]))
    positives, negatives = (np.concatenate([[0], count.cumsum()]) for count in counts)
    return values, positives, negatives


def _of_thresholds(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray, table: np.ndarray) -> float:
    """Positive is what reaches a threshold."""
    return float(table[negatives[-1] - negatives, positives].max())


def _of_intervals(
    values: np.ndarray, positives: np.ndarray, negatives: np.ndarray, width: float, table: np.ndarray
) -> float:
    """Positive is what lies in an interval of the values i (rows) to j (columns), its edges before the next values."""
    edges = np.concatenate([[-np.inf], values, [np.inf]])
    own = values[positives[1:] > positives[:-1]]
    narrowest, widest = values - values[:, None], edges[2:] - edges[:-2, None]
    fits = (narrowest >= 0) & (narrowest <= width + REACH) & (widest > width - REACH)
    fits &= (edges[2:] > own[0] + width - REACH) & (values <= own[-1] + REACH)
    # The places in the table of false positives and missed ones, which both are sums of a row's and a column's part.
    row = positives[:-1] - negatives[:-1] * table.shape[1]
    column = negatives[1:] * table.shape[1] + positives[-1] - positives[1:]
    found = table.ravel().take(row[:, None] + column, mode="clip")  # those without a place do not fit
    return float(found.max(initial=0.0, where=fits))


@cache
def _table(positives: int, negatives: int) -> np.ndarray:
    """Epsilon f64[negatives + 1, positives + 1] of rules by how many false positives and false negatives they have."""
    fpr = np.arange(negatives + 1)[:, None] / negatives
    fnr = np.arange(positives + 1)[None, :] / positives
    with np.errstate(divide="ignore", invalid="ignore"):
        ways = np.log(1 - DELTA - fpr) - np.log(fnr), np.log(1 - DELTA - fnr) - np.log(fpr)
    epsilon = np.fmax(*ways)  # one is NaN where all or none is called positive
    epsilon = np.where(np.isnan(epsilon) | (fpr * fnr == 0), 0.0, epsilon.clip(0, LARGEST))
    epsilon[0, 0] = LARGEST
    return np.asarray(epsilon)
