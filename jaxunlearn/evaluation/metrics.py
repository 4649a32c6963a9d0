"""Unlearning metrics, on the host, in numpy and float64.

The benchmark (MLS-Bench, "security-machine-unlearning") scores a model on test accuracy for the classes it should
keep (`retain_acc`), test accuracy on the class it should have forgotten (`forget_acc`), and a membership attack that
thresholds the maximum softmax probability to tell the forgotten class's training images (members) from its test images
(non-members), summarised as an area under the ROC curve.
"""

import numpy as np
from numpy.typing import ArrayLike

METRICS = (
    "retain_acc",
    "forget_acc",
    "forget_mia_auc",
    "forget_mia_auc_augmented",
    "unlearn_score",
    "symmetric_score",
    "forget_mia_auc_published",
    "unlearn_score_published",
)


def mann_whitney_auc(members: ArrayLike, non_members: ArrayLike) -> float:
    """Probability that a random member scores above a random non-member, a tie counting one half.

    With `R` the sum of the members' ranks (from 1, ties averaged) among all `M + N` scores,

        AUC = (R - M (M + 1) / 2) / (M N),

    because `M (M + 1) / 2` is the rank sum of the members among themselves and what is left counts, for every member,
    the non-members below it. Ranks are multiples of one half, so the sum is exact.

    Args:
      members: float[M] scores, `M >= 1`, any real dtype; only their order matters.
      non_members: float[N] scores, `N >= 1`.

    Raises:
      ValueError: either is empty, not one-dimensional, or not finite.
    """
    scores, count = _joined(members, non_members)
    _, which, times = np.unique(scores, return_inverse=True, return_counts=True)
    return _auc((np.cumsum(times) - (times - 1) / 2)[which], count)


def published_auc(members: ArrayLike, non_members: ArrayLike) -> float:
    """The area as the published numbers were computed: each score ranked by its place in a sort, ties not averaged.

    Same formula and arguments as `mann_whitney_auc`. The published values depend on how the original's sort happened to
    order ties. Here it is a stable ascending sort of members followed by non-members, so every tie counts against the
    member and a model with one confidence for everything gets 0. Without ties the two areas are the same number.
    """
    scores, count = _joined(members, non_members)
    ranks = np.empty(scores.size)
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, scores.size + 1)
    return _auc(ranks, count)


def unlearning_metrics(
    test_correct: ArrayLike,
    test_labels: ArrayLike,
    forget_class: int,
    member_confidence: ArrayLike,
    non_member_confidence: ArrayLike,
    augmented_confidence: ArrayLike,
    augmented_scores: bool = False,
) -> dict[str, float]:
    """All metrics of one model, as fractions, in the order of `METRICS`.

    With r = retain_acc, f = forget_acc and a = forget_mia_auc, or forget_mia_auc_augmented with `augmented_scores`,

        unlearn_score   = (r + (1 - f) + (1 - a)) / 3                  the benchmark's score
        symmetric_score = (r + (1 - f) + (1 - 2 |a - 1/2|)) / 3        ours

    The benchmark rewards an area below one half without limit, although an attack that is wrong too often reveals as
    much as one that is right too often; in the symmetric score only one half is private. `*_published` use
    `published_auc`.

    Args:
      test_correct: bool[T], whether the top-1 prediction over all classes is the label, for each test image.
      test_labels: int[T].
      forget_class: the label to forget.
      member_confidence: float[M], maximum softmax probability of every training image of the forget class.
      non_member_confidence: float[N], the same of every test image of the forget class.
      augmented_confidence: float[M], the members' once they are cropped and flipped as in training.

    Raises:
      ValueError: a confidence is not finite (report `diverged_metrics` instead), or there is nothing to average.
    """
    correct, labels = np.asarray(test_correct, bool), np.asarray(test_labels)
    if correct.shape != labels.shape or correct.ndim != 1:
        raise ValueError(f"test_correct {correct.shape} and test_labels {labels.shape} must be vectors of one length")
    forget = labels == forget_class
    if not forget.any() or forget.all():
        raise ValueError(f"the test labels need images of class {forget_class} and of other classes")
    retain_acc, forget_acc = float(correct[~forget].mean()), float(correct[forget].mean())
    clean, augmented = (
        mann_whitney_auc(members, non_member_confidence) for members in (member_confidence, augmented_confidence)
    )
    auc = augmented if augmented_scores else clean
    auc_published = published_auc(
        augmented_confidence if augmented_scores else member_confidence, non_member_confidence
    )

    def score(privacy: float) -> float:
        return (retain_acc + (1 - forget_acc) + privacy) / 3

    values = (
        retain_acc,
        forget_acc,
        clean,
        augmented,
        score(1 - auc),
        score(1 - 2 * abs(auc - 0.5)),
        auc_published,
        score(1 - auc_published),
    )
    return dict(zip(METRICS, values, strict=True))


def diverged_metrics() -> dict[str, None]:
    """What stands in for `unlearning_metrics` when a model's logits are not finite: the same keys, every value None.

    An argmax over NaN is class 0, which would otherwise pass for an accuracy.
    """
    return dict.fromkeys(METRICS)


def auc_standard_error(members: int, non_members: int) -> float:
    """Standard error of the area when members and non-members score alike: sqrt((M + N + 1) / (12 M N)).

    The exact Mann-Whitney variance under the null hypothesis of equal, continuous distributions.
    """
    return float(np.sqrt((members + non_members + 1) / (12 * members * non_members)))


def _joined(members: ArrayLike, non_members: ArrayLike) -> tuple[np.ndarray, int]:
    parts = [np.asarray(part, np.float64) for part in (members, non_members)]
    if any(part.ndim != 1 or part.size == 0 for part in parts):
        raise ValueError(f"members and non-members must be non-empty vectors, not {[part.shape for part in parts]}")
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return scores, parts[0].size


def _auc(ranks: np.ndarray, members: int) -> float:
    others = ranks.size - members
    return float((ranks[:members].sum() - members * (members + 1) / 2) / (members * others))
