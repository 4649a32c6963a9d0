"""How far the answers of one model are from another's, on the host, in numpy and float64.

Logits are float[N, C]. A logit of minus infinity is a probability of zero (an output mask); a row that has another
non-finite logit, or no finite one, is refused with a ValueError.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, rel_entr

# The sets of images on which accuracies are compared.
COMPARED = ("retain_train", "forget_train", "retain_test", "forget_test")


def log_probabilities(logits: ArrayLike) -> np.ndarray:
    """Log-softmax f64[N, C] of float[N, C]; minus infinity where a logit is."""
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"logits must be a non-empty matrix, not {values.shape}")
    if not np.isfinite(values.max(axis=1)).all():  # the maximum of a row with a NaN is NaN
        raise ValueError("logits must be finite, or minus infinity in some columns")
    return log_softmax(values, axis=1)


def without_class(logits: ArrayLike, label: int) -> np.ndarray:
    """A copy of the logits with one class's column at minus infinity: the model under an output mask."""
    masked = np.array(logits)
    masked[:, label] = -np.inf
    return masked


def jensen_shannon(logits_a: ArrayLike, logits_b: ArrayLike) -> float:
    """Mean over images of 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, in nats: from 0 to ln 2, symmetric.

    Not what public code calls by the name: KL(m || p), divided by the number of classes too, is next to nothing
    whatever the models say.
    """
    p, q = _both(logits_a, logits_b)
    middle = (p + q) / 2
    each = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / 2
    return float(each.clip(0, np.log(2)).mean())  # the bounds, which rounding oversteps


def activation_distance(logits_a: ArrayLike, logits_b: ArrayLike) -> float:
    """Mean over images of the 2-norm of the difference of the softmax: from 0 to the root of 2."""
    p, q = _both(logits_a, logits_b)
    return float(np.linalg.norm(p - q, axis=1).mean())


def gaps(own: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """By how much the accuracy on each set of `COMPARED` differs from the reference's, without sign."""
    return {name: abs(own[name] - reference[name]) for name in COMPARED}


def average_gap(
    own: Mapping[str, float], reference: Mapping[str, float], own_area: float, reference_area: float
) -> float:
    """The mean of SalUn's four gaps, |UA|, |RA|, |TA| and |MIA|, to a reference.

    UA is 1 - accuracy on forget_train, RA the accuracy on retain_train, TA on retain_test. MIA departs from SalUn,
    whose number comes from a support vector machine (`attacks.svc_attack`): here it is the area of the attack by
    confidence on clean images, which every record has. Averages are therefore not those of SalUn's table.

    Args:
      own: accuracies of the model by names of `COMPARED`, fractions.
      reference: the same of the reference.
      own_area: the model's area.
      reference_area: the reference's.
    """
    differences = gaps(own, reference)
    parts = [differences[name] for name in ("forget_train", "retain_train", "retain_test")]
    return float(np.mean([*parts, abs(own_area - reference_area)]))


def tug_of_war(own: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Product over forget_train, retain_train and retain_test of 1 - gap: 1 answers like the reference, 0 as unlike."""
    differences = gaps(own, reference)
    return float(np.prod([1 - differences[name] for name in ("forget_train", "retain_train", "retain_test")]))


def _both(logits_a: ArrayLike, logits_b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of both."""
    log_p, log_q = log_probabilities(logits_a), log_probabilities(logits_b)
    if log_p.shape != log_q.shape:
        raise ValueError(f"both models must answer the same images: {log_p.shape} and {log_q.shape}")
    return np.exp(log_p), np.exp(log_q)
