"""Attacks that tell a forgotten class's training images (members) from its test images, on the host, in float64.

Further ones than the benchmark's own (`metrics`), from the same logits, and how sure an area is.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from jaxunlearn.evaluation.distances import log_probabilities
from jaxunlearn.evaluation.metrics import mann_whitney_auc

ATTACKS = ("confidence", "entropy", "modified_entropy", "true_probability")
BINS = 20  # of a histogram of probabilities
RATES = 101  # points of a curve
BLOCK = 2**21  # numbers of one array of the bootstrap: 16 MiB
LARGEST = np.finfo(np.float64).max


def attack_areas(members: ArrayLike, non_members: ArrayLike, labels: int) -> dict[str, float]:
    """Area of each of `ATTACKS`: how often a member scores above a non-member, ties half.

    With p the softmax and y the true class the scores are

        confidence         max_j p_j
        entropy            sum_j p_j log p_j
        modified_entropy   (1 - p_y) log p_y + sum_{j != y} p_j log(1 - p_j)     (Song and Mittal, 2021)
        true_probability   p_y

    entropies with their sign turned, so that a member is expected above one half in all. Probabilities are ordered by
    p / (1 - p), which tells apart what rounds to 1: in float32 softmax more ties, and its area may differ.

    Args:
      members: float[M, C] logits of the forgotten class's training images; minus infinity is a probability of zero.
      non_members: float[N, C] of its test images.
      labels: y, the class that all of them have.

    Raises:
      ValueError: a logit is not finite otherwise, or there are none.
    """
    scores = [_scores(logits, labels) for logits in (members, non_members)]
    return {name: mann_whitney_auc(scores[0][name], scores[1][name]) for name in ATTACKS}


def roc(members: ArrayLike, non_members: ArrayLike) -> list[float]:
    """Which share of float[M] members scores above the thresholds that 0, .01, ..., 1 of the non-members score above.

    101 fractions, to four decimals. Between two thresholds, as where many tie, the curve is a straight line. The area
    below it is that of `mann_whitney_auc` but for what lies between its points.

    Raises:
      ValueError: one of the two is empty, not a vector or not finite.
    """
    mann_whitney_auc(members, non_members)  # refuses what has no curve
    ours, others = np.sort(members), np.sort(non_members)
    thresholds = np.unique(np.concatenate([ours, others]))[::-1]
    caught, accused = (
        np.append(0, scores.size - np.searchsorted(scores, thresholds)).astype(float) for scores in (ours, others)
    )
    wanted = np.arange(RATES) * others.size / (RATES - 1)  # exact where it is whole
    at = np.searchsorted(accused, wanted, side="right") - 1  # the last, which catches most of those that accuse as many
    then = np.minimum(at + 1, thresholds.size)
    part = (wanted - accused[at]) / np.maximum(1, accused[then] - accused[at])
    return ((caught[at] + part * (caught[then] - caught[at])) / ours.size).round(4).tolist()


def bootstrap_interval(
    members: ArrayLike, non_members: ArrayLike, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of `metrics.mann_whitney_auc`: members and non-members are drawn anew, each among their own.

    The same arguments give the same interval. It says how far the area depends on which images there are, not how far
    on the seed. Memory stays below 100 MB.

    Args:
      members: float[M] scores.
      non_members: float[N] scores.
      draws: how often.
      level: share of the draws' areas that lie in the interval.

    Raises:
      ValueError: as `metrics.mann_whitney_auc`.
    """
    mann_whitney_auc(members, non_members)  # refuses what has no area
    member_scores, other_scores = np.asarray(members, np.float64), np.asarray(non_members, np.float64)
    # All that matters of a score is its place, and of a draw how often it has each place.
    values = np.unique(np.concatenate([member_scores, other_scores]))
    places = [np.searchsorted(values, scores) for scores in (member_scores, other_scores)]
    rng, areas = np.random.default_rng(0), []
    block = max(1, BLOCK // (values.size + member_scores.size + other_scores.size))
    for start in range(0, draws, block):
        drawn, others = (_draw(rng, place, min(block, draws - start), values.size) for place in places)
        below = others.cumsum(axis=1) - others / 2  # non-members below each place, those at it half
        areas.append(np.einsum("ij,ij->i", drawn, below) / (member_scores.size * other_scores.size))
    low, high = np.quantile(np.concatenate(areas), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def svc_attack(retain_train: ArrayLike, retain_test: ArrayLike, forget_train: ArrayLike) -> float:
    """Share of the forgotten training images that a support vector machine calls non-members (the SalUn line's "MIA").

    It learns to tell retained training images (members) from retained test images by p_y alone, from the first of each,
    equally many, with an RBF kernel, C = 3 and gamma = 1. Fitting and asking took 5 s with 2 x 9,000 images and 5,000
    forgotten ones, on one core; the time grows with the square. Where p_y is the same for all, rounding decides
    whether the answer is 0 or 1.

    Args:
      retain_train: float[A], the probability of the true class of retained training images.
      retain_test: float[B], of retained test images.
      forget_train: float[M], of the forgotten class's training images.

    Raises:
      ValueError: one is empty or not finite.
    """
    from sklearn.svm import SVC  # a second to import

    parts = [np.asarray(part, np.float64) for part in (retain_train, retain_test, forget_train)]
    if any(part.ndim != 1 or part.size == 0 or not np.isfinite(part).all() for part in parts):
        raise ValueError(f"probabilities must be non-empty, finite vectors, not {[part.shape for part in parts]}")
    known, unknown, forgotten = parts
    size = min(known.size, unknown.size)
    machine = SVC(C=3, kernel="rbf", gamma="auto")
    machine.fit(np.concatenate([known[:size], unknown[:size]])[:, None], np.repeat([1, 0], size))
    return float((machine.predict(forgotten[:, None]) == 0).mean())


def histogram(confidence: ArrayLike) -> list[int]:
    """How many probabilities float[N] lie in each of 20 equal bins of [0, 1]; a bin has its lower edge, the last both.

    Raises:
      ValueError: one lies elsewhere.
    """
    values = np.asarray(confidence, np.float64)
    counts, _ = np.histogram(values, BINS, (0, 1))
    if counts.sum() != values.size:
        raise ValueError("probabilities must lie in [0, 1]")
    return counts.tolist()


def _scores(logits: ArrayLike, label: int) -> dict[str, np.ndarray]:
    """The scores of `attack_areas`, f64[N] each and finite, probabilities as log p - log(1 - p)."""
    log_p = log_probabilities(logits)
    rows, top = np.arange(len(log_p)), log_p.argmax(axis=1)
    # log(1 - p) is log1p(-p), but for the largest p, which may round to 1, the sum of the others.
    others, p = log_p.copy(), np.exp(log_p)
    others[rows, top], p[rows, top] = -np.inf, 0
    log_rest = np.log1p(-p)
    log_rest[rows, top] = rest = logsumexp(others, axis=1)
    p[rows, top] = np.exp(log_p[rows, top])
    # And then the largest log p is known better by what it lacks.
    log_p[rows, top] = np.where(rest < np.log(0.5), np.log1p(-np.exp(rest)), log_p[rows, top])

    wrong = np.delete(np.arange(log_p.shape[1]), label)
    log_true, log_false = log_p[:, label], log_rest[:, label]
    scores = {
        "confidence": log_p[rows, top] - rest,
        "entropy": (p * np.maximum(log_p, -LARGEST)).sum(axis=1),  # 0 log 0 = 0
        "modified_entropy": np.exp(log_false) * log_true + (p * log_rest)[:, wrong].sum(axis=1),
        "true_probability": log_true - log_false,
    }
    # An infinite score, of a masked class, ties with its like.
    return {name: score.clip(-LARGEST, LARGEST) for name, score in scores.items()}


def _draw(rng: np.random.Generator, places: np.ndarray, draws: int, values: int) -> np.ndarray:
    """int[draws, values]: how often each place comes up when as many are drawn as there are, with replacement."""
    drawn = places[rng.integers(places.size, size=(draws, places.size))]
    drawn += np.arange(draws)[:, None] * values
    return np.bincount(drawn.ravel(), minlength=draws * values).reshape(draws, values)
