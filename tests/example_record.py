"""A whole record, of three classes of which class 0 is forgotten, for tests of what reads records."""

import copy
import dataclasses
from typing import Any

from jaxunlearn.benchmarks import Protocol

METRICS = {
    "retain_acc": 0.9,
    "forget_acc": 0.1,
    "forget_mia_auc": 0.55,
    "forget_mia_auc_augmented": 0.53,
    "unlearn_score": 0.75,
    "symmetric_score": 0.9,
    "forget_mia_auc_published": 0.54,
    "unlearn_score_published": 0.7533,
}
COMPANIONS = {
    "retain_train_acc": 0.99,
    "forget_train_acc": 0.2,
    "class_acc": [0.1, 0.95, 0.85],
    "worst_retain_acc": 0.85,
    "forgotten_as": {"train": [10, 25, 15], "test": [1, 6, 3]},
    "attacks": {"confidence": 0.55, "entropy": 0.56, "modified_entropy": 0.6, "true_probability": 0.61},
    "intervals": {"clean": [0.4, 0.7], "augmented": [0.38, 0.68]},
    "histograms": {
        "members": [0] * 18 + [20, 30],
        "members_augmented": [0] * 19 + [50],
        "non_members": [0] * 19 + [10],
    },
    "roc": {"members": [k / 100 for k in range(101)], "members_augmented": [0.0] * 50 + [1.0] * 51},
    "mask_divergence": 0.2,
    "against_retrain": {
        "seed": 42,
        "gaps": {"retain_train": 0.01, "forget_train": 0.2, "retain_test": 0.02, "forget_test": 0.1},
        "average_gap": 0.0825,
        "tug_of_war": 0.7,
        "js": 0.1,
        "activation_distance": 0.3,
    },
    "full": {
        "svc_attack": 0.7,
        "probe_acc": 0.9,
        "probe_excess": 0.05,
        "relearning": [0.1 * step for step in range(10)] + [1.0],
        "relearn_ratio": 1.2,
    },
}
BEFORE = METRICS | {"forget_acc": 0.9, "companions": COMPANIONS | {"against_retrain": None, "full": None}}
PROTOCOL = Protocol(model="resnet20", dataset="cifar10", mean=(0.5,) * 3, std=(0.25,) * 3)
EXAMPLE = {
    "schema": 3,
    "bench": "resnet20-cifar10-class0",
    "method": "scrub",
    "seed": 42,
    "unlearn_seed": 0,
    **METRICS,
    "companions": COMPANIONS,
    "before": BEFORE,
    "curves": {
        "pretrain": {"loss": [1.5, 0.7], "accuracy": [0.4, 0.8]},
        "unlearn": {"retain_loss": [0.2, 0.1], "forget_loss": [1.0, None]},
        "evaluated": {
            "epoch": [0, 2],
            "retain_acc": [0.92, 0.9],
            "forget_acc": [0.9, 0.1],
            "forget_mia_auc": [0.56, None],
            "unlearn_score": [0.5, 0.75],
            "symmetric_score": [0.6, 0.9],
        },
    },
    "scored": "last",
    "flags": {"collapsed": False, "inverted_membership": False, "above_retrain": None, "output_mask": False},
    "unlearn_steps": 100,
    "protocol": dataclasses.asdict(PROTOCOL) | {"mean": [0.5] * 3, "std": [0.25] * 3},  # as in a file
    "hyperparameters": {"temperature": 4.0},
    "rule_digest": "0123456789abcdef" * 4,
    "command": "jaxunlearn bench --bench resnet20-cifar10-class0",
    "dataset": {"digest": "c257da322a0d649b", "verified": True},
    "timing": {
        "data_s": 0.5,
        "compile_s": 10.0,
        "pretrain_s": 100.0,
        "prepare_s": 2.0,
        "unlearn_s": 20.0,
        "evaluate_s": 5.0,
        "companions_s": 1.0,
        "checkpoint_s": 0.1,
    },
    "throughput": {"pretrain_images_per_s": 1000.0, "unlearn_steps_per_s": 5.0},
    "environment": {
        "versions": {"jaxunlearn": "0.1.0", "python": "3.11.7", "jax": "0.10.2", "scikit-learn": None},
        "device_kind": "cpu",
        "device_count": 1,
        "trained_on": {"pretrain": ["cpu"], "unlearn": ["cpu"]},
        "deterministic": True,
        "cpu": {"model": "a processor", "cores": 2, "compiled_kernels": True},
        "git_commit": None,
    },
    "status": "ok",
    "diverged_at": None,
    "untrained_in": None,
    "attempts": {"pretrain": 1},
    "finished_at": "2026-01-01T00:00:00+00:00",
}


def example_record(**changes: Any) -> dict[str, Any]:
    """A new copy of the record, with other values of some of its keys."""
    return copy.deepcopy(EXAMPLE) | changes


def diverged_record(**changes: Any) -> dict[str, Any]:
    """The same of a model that diverged in unlearning."""
    none: dict[str, Any] = dict.fromkeys([*METRICS, "companions"])
    flags = dict.fromkeys(EXAMPLE["flags"])  # type: ignore[call-overload]
    at = {"phase": "unlearn", "step": 7}
    return example_record(**none, flags=flags, status="diverged", diverged_at=at) | changes


DROPPED = object()


def place(record: Any, path: str, value: Any) -> None:
    """Sets what is at 'companions.class_acc.0'; DROPPED takes it away."""
    *outer, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in outer:
        record = record[step]
    if value is DROPPED:
        del record[last]
    else:
        record[last] = value
