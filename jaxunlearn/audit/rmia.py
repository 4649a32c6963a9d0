"""RMIA: does a model know an example better than it knows others, measured by a few models that never saw it?

The cheapest attack on single examples (Zarifzadeh et al., arXiv 2312.03262, section 3).
"""

import numpy as np

from jaxunlearn.audit.margins import log_confidence

REFERENCES = 4  # at most
OFFLINE = 0.3  # a: how much of what the references say is taken for what the average over all models would


def references_of(models: int) -> int:
    """How many of so many retrained models are references; the others are what unlearned ones are told apart from."""
    return min(REFERENCES, max(1, models // 4))


def rmia_scores(
    margins: np.ndarray, population: np.ndarray, reference: np.ndarray, reference_population: np.ndarray
) -> np.ndarray:
    """The share of the population that each model knows less well than the example, f64[N, F].

    With p the probability of the class that the margin is of, and p_out those of references,

        ratio(x) = p(x) / ((1 + a) / 2 mean p_out(x) + (1 - a) / 2),    score(x) = share of z with ratio(x) > ratio(z).

    Args:
      margins: f64[N, F] of F examples by N models.
      population: f64[N, Z] of Z images that nobody trained on, by the same models.
      reference: f64[K, F] of the examples by K models that never saw them, of seeds that none of the N is of.
      reference_population: f64[K, Z], of the population by the same.
    """
    ratios = log_confidence(margins) - _usual(reference)
    others = np.sort(log_confidence(population) - _usual(reference_population), axis=1)
    below = [np.searchsorted(known, own, "left") for known, own in zip(others, ratios, strict=True)]
    return np.stack(below) / others.shape[1]


def _usual(reference: np.ndarray) -> np.ndarray:
    """log of what a ratio is over, f64[images]."""
    known = np.exp(log_confidence(reference)).mean(axis=0)
    return np.log((1 + OFFLINE) / 2 * known + (1 - OFFLINE) / 2)
