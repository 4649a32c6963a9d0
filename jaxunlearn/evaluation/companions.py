"""What stands beside the scores in every record, made of one model's predictions: see docs/metrics.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from jaxunlearn.evaluation import distances
from jaxunlearn.evaluation.attacks import attack_areas, bootstrap_interval, histogram, roc, svc_attack
from jaxunlearn.evaluation.metrics import diverged_metrics, unlearning_metrics
from jaxunlearn.evaluation.predictions import Predictions, Sets
from jaxunlearn.evaluation.probing import probe_accuracy


class Companions:
    """Makes companions of predictions on images with these labels."""

    def __init__(self, labels: Sets, forget_class: int, augmented_scores: bool):
        self._labels, self._class, self._augmented_scores = labels, forget_class, augmented_scores
        self._is_forget = labels.test == forget_class

    def metrics(self, own: Predictions) -> dict[str, Any]:
        """The metrics of a model; all None where it has diverged."""
        if not own.finite(self._class):
            return diverged_metrics()
        members, augmented, others = self._confidences(own)
        correct = own.logits.test.argmax(1) == self._labels.test
        return unlearning_metrics(
            correct, self._labels.test, self._class, members, others, augmented, self._augmented_scores
        )

    def alone(self, own: Predictions, pretrained: Predictions | None) -> dict[str, Any]:
        """What can be said of a finite model without a retrained one: JSON values, by name.

        Args:
          pretrained: what the model before unlearning says; None where it has diverged.
        """
        test, members, _, others = own.logits
        answers, classes = test.argmax(1), test.shape[1]
        right = np.bincount(self._labels.test[answers == self._labels.test], minlength=classes)
        class_acc = (right / np.maximum(1, np.bincount(self._labels.test, minlength=classes))).tolist()
        present = set(np.unique(self._labels.test).tolist()) - {self._class}
        confidences = dict(zip(("members", "augmented", "others"), self._confidences(own), strict=True))
        mask = pretrained and distances.without_class(pretrained.logits.forget_train, self._class)
        return {
            "retain_train_acc": _accuracy(others, self._labels.retain_train),
            "forget_train_acc": _accuracy(members, self._labels.forget_train),
            "class_acc": class_acc,
            "worst_retain_acc": min(class_acc[label] for label in present),
            "forgotten_as": {
                "train": np.bincount(members.argmax(1), minlength=classes).tolist(),
                "test": np.bincount(answers[self._is_forget], minlength=classes).tolist(),
            },
            "attacks": attack_areas(members, test[self._is_forget], self._class),
            "intervals": {
                "clean": list(bootstrap_interval(confidences["members"], confidences["others"])),
                "augmented": list(bootstrap_interval(confidences["augmented"], confidences["others"])),
            },
            "histograms": {
                "members": histogram(confidences["members"]),
                "members_augmented": histogram(confidences["augmented"]),
                "non_members": histogram(confidences["others"]),
            },
            "roc": {
                "members": roc(confidences["members"], confidences["others"]),
                "members_augmented": roc(confidences["augmented"], confidences["others"]),
            },
            "mask_divergence": None if mask is None else distances.jensen_shannon(members, mask),
        }

    def against_retrain(
        self, own: Predictions, reference: Predictions, area: float, reference_area: float
    ) -> dict[str, Any]:
        """How far a finite model is from a finite one that never saw the class; the areas are of clean members."""
        accuracies = self._accuracies(own), self._accuracies(reference)
        members = own.logits.forget_train, reference.logits.forget_train
        return {
            "gaps": distances.gaps(*accuracies),
            "average_gap": distances.average_gap(*accuracies, area, reference_area),
            "tug_of_war": distances.tug_of_war(*accuracies),
            "js": distances.jensen_shannon(*members),
            "activation_distance": distances.activation_distance(*members),
        }

    def full(self, own: Predictions, relearning: Sequence[float]) -> dict[str, Any]:
        """What takes longer, of a finite model and its curve of relearning."""
        assert own.features is not None
        features, tests = own.features, ~self._is_forget
        true = (_probability(x, labels) for x, labels in zip(own.logits, self._labels, strict=True))
        test, forget_train, _, retain_train = true
        return {
            "svc_attack": svc_attack(retain_train, test[tests], forget_train),
            "probe_acc": probe_accuracy(features.forget_train, features.retain_train, features.test, self._is_forget),
            "probe_excess": None,
            "relearning": [round(float(value), 6) for value in relearning],
            "relearn_ratio": None,
        }

    def _confidences(self, own: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maximum softmax probabilities of members, augmented members and non-members, f32."""
        sets = own.logits.forget_train, own.logits.augmented, own.logits.test[self._is_forget]
        with np.errstate(over="ignore"):  # of logits 1e38 apart
            members, augmented, others = (softmax(logits, 1).max(1) for logits in sets)
        return members, augmented, others

    def _accuracies(self, own: Predictions) -> dict[str, float]:
        logits, labels = own.logits, self._labels
        return {
            "retain_train": _accuracy(logits.retain_train, labels.retain_train),
            "forget_train": _accuracy(logits.forget_train, labels.forget_train),
            "retain_test": _accuracy(logits.test[~self._is_forget], labels.test[~self._is_forget]),
            "forget_test": _accuracy(logits.test[self._is_forget], labels.test[self._is_forget]),
        }


def compared(own: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """`full` of a model beside that of a retrained one: with the probe's excess over it and the relearning ratio."""
    here, there = (float(np.mean(one["relearning"][1:])) for one in (own, reference))
    excess = own["probe_acc"] - reference["probe_acc"]
    return {**own, "probe_excess": excess, "relearn_ratio": here / there if there else None}


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def _probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """f64[N]: that of each image's label."""
    return np.asarray(np.exp(distances.log_probabilities(logits)[np.arange(len(labels)), labels]))
