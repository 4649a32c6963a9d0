"""U-LiRA: was this example forgotten by this model, or never seen? (Hayes et al., arXiv 2403.01218, section 4)."""

import numpy as np

FOLDS = 4  # at most; a model is scored by a fit to the other folds
MANY = 64  # models of a fit, from which on each example has a deviation of its own
SMALLEST = 1e-3  # deviation, so that there is one where all margins are alike, as clipped ones may be


def folds_of(models: int) -> int:
    """How many folds so many models make: each fit has at least two of a kind."""
    return min(FOLDS, models // 2)


def ulira_scores(unlearned: np.ndarray, retrained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log N(phi; unlearned) - log N(phi; retrained) of every margin, by normals that its model had no part in.

    Models s, s + K, s + 2K, ... are one of K folds, of both kinds: an unlearned and a retrained model in one row may
    share an initialisation, so neither may be in the fit that scores the other. Each example has means of its own; its
    deviations are those of all examples pooled, each kind's, and its own from 64 models of a fit on. A score above zero
    says unlearned.

    Args:
      unlearned: f64[N, F] margins of F examples by N models, N >= 4, finite.
      retrained: f64[N, F], of models that never saw the examples.

    Returns:
      f64[N, F] of the unlearned models and of the retrained ones.
    """
    folds = folds_of(len(unlearned))
    pooled = len(unlearned) + -len(unlearned) // folds < MANY  # by the smallest fit: scores of all folds must compare
    scores = np.empty_like(unlearned), np.empty_like(retrained)
    for fold in range(folds):
        held = np.arange(len(unlearned)) % folds == fold
        fits = [_fit(margins[~held], pooled) for margins in (unlearned, retrained)]
        for own, margins in zip(scores, (unlearned, retrained), strict=True):
            own[held] = _log_density(margins[held], *fits[0]) - _log_density(margins[held], *fits[1])
    return scores


def _fit(margins: np.ndarray, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the examples, f64[F] each."""
    variance = margins.var(axis=0, ddof=1)
    if pooled:
        variance = np.full_like(variance, variance.mean())
    return margins.mean(axis=0), np.sqrt(variance).clip(SMALLEST)


def _log_density(margins: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Of a normal, but for a constant."""
    return -np.log(deviation) - ((margins - mean) / deviation) ** 2 / 2
