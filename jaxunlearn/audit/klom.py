"""KLOM: how far margins of unlearned models are spread from those of retrained ones (arXiv 2410.23232, section 2)."""

from functools import cache

import numpy as np

BINS = 20
ADDED = 1e-5  # to the share of each bin
PERCENTILE = 95.0
SIMULATED = 2000  # examples of the floor


def klom(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """KL(unlearned || retrained) of each example's histograms, in nats, f64[F]: 0 for the same, at most ln(1 + 1e5).

    Bins are 20 of equal width from the smallest to the largest of both, the last with its upper edge; 1e-5 is added to
    the share of each. (The authors' code adds it to empty bins of the retrained models only, and drops the largest
    margin, since its last bin has no upper edge.)

    Args:
      unlearned: f64[N, F] margins of F examples by N models, finite.
      retrained: f64[M, F].
    """
    both = np.concatenate([unlearned, retrained])
    low, width = both.min(axis=0), np.ptp(both, axis=0)
    with np.errstate(invalid="ignore"):
        place = np.where(width > 0, (both - low) / np.where(width > 0, width, 1) * BINS, 0)
    bins = place.astype(np.int64).clip(0, BINS - 1) + BINS * np.arange(both.shape[1])
    p, q = (_shares(part, both.shape[1]) for part in (bins[: len(unlearned)], bins[len(unlearned) :]))
    return (p * np.log(p / q)).sum(axis=1)


def klom_percentile(unlearned: np.ndarray, retrained: np.ndarray) -> float:
    """The 95th percentile over the examples, which is what is reported."""
    return float(np.percentile(klom(unlearned, retrained), PERCENTILE))


@cache
def klom_floor(models: int) -> float:
    """What `klom_percentile` gives where both are spread alike: simulated, of normals with so many models a side."""
    draws = np.random.default_rng(0).normal(size=(2, models, SIMULATED))
    return klom_percentile(*draws)


def _shares(bins: np.ndarray, examples: int) -> np.ndarray:
    """f64[F, bins], of int[N, F]: which of all examples' bins each margin lies in."""
    counts = np.bincount(bins.ravel(), minlength=BINS * examples).reshape(examples, BINS)
    return np.asarray(counts / len(bins) + ADDED)
