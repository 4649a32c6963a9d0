"""What several seeds say: intervals, paired differences, ranks with ties, and where the spread comes from.

Pure, numpy, float64. A seed is one original: a model pretrained anew, and all that was unlearned from it. Intervals are
Student's t, two-sided; they hold the spread over seeds, not that of the test images, which all seeds share.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean difference over seeds that two rows share."""

    mean: float
    half_width: float  # of the interval of the mean
    pairs: int


class Components(NamedTuple):
    """Variances of a value between originals and between the unlearnings of one; None where one original is all."""

    train: float | None
    unlearn: float
    of_mean: float | None  # of the mean over the originals' means


def t_interval(values: Sequence[float], level: float = LEVEL) -> float | None:
    """Half width of the t-interval of the mean of n values: t((1 + level) / 2, n - 1) s / sqrt(n). None below two."""
    if len(values) < 2:
        return None
    deviation = np.std(np.asarray(values, np.float64), ddof=1)
    return float(stdtrit(len(values) - 1, (1 + level) / 2) * deviation / math.sqrt(len(values)))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = LEVEL) -> Difference | None:
    """The mean of a - b over the seeds that both have, and its interval. None below two such seeds."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    half_width = t_interval(differences, level)
    return None if half_width is None else Difference(float(np.mean(differences)), half_width, len(differences))


def ranks(rows: Sequence[Mapping[int, float]]) -> list[int | None]:
    """Ranks of rows by their mean score, with ties where the seeds cannot tell two rows apart.

    From the highest mean down (equal means in the order given), the first row leads rank 1. Each further row is
    compared with the leader of the rank that was given last: where the leader's mean paired difference is above zero by
    more than the half width of its 95% interval, the row leads a rank of its own, one more than the number of rows
    ranked before it; else it shares the leader's ("1, 1, 3"). Differences that are all zero are a tie. So a shared rank
    says "not told from its leader", and two rows of different ranks may still not be told apart from each other.
    Intervals are each by itself: nothing is corrected for the number of rows.

    Args:
      rows: score by seed of each row, higher is better.

    Returns:
      A rank a row, in the order given; None where a row has fewer than two seeds, or than two in common with the leader
      that it is compared with. Such a row leads nothing and is not counted.
    """
    found: list[int | None] = [None] * len(rows)
    several = [index for index, row in enumerate(rows) if len(row) > 1]
    order = sorted(several, key=lambda index: -math.fsum(rows[index].values()) / len(rows[index]))
    leader, rank, ranked = next(iter(order), 0), 1, 0
    for index in order:
        ahead = paired_difference(rows[leader], rows[index])  # the first against itself: a tie
        if ahead is None:
            continue
        if ahead.mean > ahead.half_width:
            leader, rank = index, ranked + 1
        found[index], ranked = rank, ranked + 1
    return found


def variance_components(values: Mapping[int, Sequence[float]]) -> Components | None:
    """One-way random-effects ANOVA of J unlearnings of each of I originals (arXiv 2510.26714).

    With S_b and S_w the mean squares between and within originals,

        unlearn = S_w,    train = max(0, (S_b - S_w) / J),    of_mean = train / I + unlearn / (I J).

    Where originals have different numbers J_i of unlearnings, N in all, S_b weighs each original by J_i and J in
    `train` is (N - sum J_i^2 / N) / (I - 1): the customary moment estimator, unbiased but for the floor. J in `of_mean`
    is the harmonic mean of the J_i, which makes it the variance of the mean over the originals' means.

    Args:
      values: at least one value of each original, by seed.

    Returns:
      Variances; None where no original was unlearned from twice.
    """
    groups = [np.asarray(group, np.float64) for group in values.values()]
    sizes, originals = np.array([group.size for group in groups], np.float64), len(groups)
    total = sizes.sum()
    if total == originals:
        return None
    means = np.array([group.mean() for group in groups])
    unlearn = float(sum(((group - group.mean()) ** 2).sum() for group in groups) / (total - originals))
    if originals < 2:
        return Components(None, unlearn, None)
    between = (sizes * (means - (sizes * means).sum() / total) ** 2).sum() / (originals - 1)
    alike = (total - (sizes**2).sum() / total) / (originals - 1)
    train = max(0.0, float((between - unlearn) / alike))
    return Components(train, unlearn, float(train / originals + unlearn * (1 / sizes).sum() / originals**2))
