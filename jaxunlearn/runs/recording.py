"""What makes a record of a run."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxunlearn.evaluation.metrics import diverged_metrics
from jaxunlearn.registry import RETRAIN, Method
from jaxunlearn.runs.preparation import Prepared
from jaxunlearn.training.pretrained import Models

COLLAPSE = 0.1  # of the accuracy on the retained classes


class Scored(NamedTuple):
    """Models, and the metrics of each seed's."""

    models: Models
    metrics: list[dict[str, Any]]


def make_record(
    run: Prepared, method: Method, index: int, before: Scored, after: Scored, steps: int, common: Mapping[str, float]
) -> dict[str, Any]:
    """The record of one seed, JSON values in the order that the README lists.

    Args:
      before, after: the pretrained models and the method's.
      steps: of the method.
      common: seconds that all methods share, by what they were spent on; `run.timing` has this method's.
    """
    request, timing, count = run.request, run.timing, len(run.request.seeds)
    pretrain_s, unlearn_s = before.models.seconds[index], after.models.seconds[index]
    images = sum(run.batches(len(run.train.labels), "training")) * request.protocol.pretrain_epochs
    metrics = after.metrics[index]
    diverged_at = _diverged(before.models.diverged[index], after.models.diverged[index], metrics)
    metrics = diverged_metrics() if diverged_at else metrics
    untrained_in = _untrained(method, before.models.untrained[index], after.models.untrained[index])
    if untrained_in == "pretrain":  # as it is, whatever became of it beside others
        metrics, unlearn_s, diverged_at = before.metrics[index], 0.0, None
    attempts = {"pretrain": before.models.attempts[index]}
    attempts |= {RETRAIN: after.models.attempts[index]} if method.name == RETRAIN else {}
    seconds = {
        "data_s": common["data_s"],
        "compile_s": common.get("compile_s", 0.0) + timing.get("compile_s", 0.0),
        "pretrain_s": pretrain_s,
        "unlearn_s": unlearn_s,
        "evaluate_s": timing["evaluate_s"] / count,
        "checkpoint_s": (common.get("checkpoint_s", 0.0) + timing.get("checkpoint_s", 0.0)) / count,
    }
    throughput = {
        "pretrain_images_per_s": images / pretrain_s if pretrain_s and untrained_in != "pretrain" else None,
        "unlearn_steps_per_s": steps / unlearn_s if steps and unlearn_s and not untrained_in else None,
    }
    return {
        "bench": request.bench,
        "method": method.name,
        "seed": request.seeds[index],
        **metrics,
        "before": before.metrics[index],
        "unlearn_steps": 0 if untrained_in else steps,
        "protocol": dataclasses.asdict(request.protocol),
        "hyperparameters": method.hyperparameters,
        "dataset": {"digest": run.digest, "verified": run.verified},
        "timing": {name: round(value, 3) for name, value in seconds.items()},
        "throughput": {name: rate and round(rate, 3) for name, rate in throughput.items()},
        "environment": run.environment,
        "status": "diverged" if diverged_at else "untrained" if untrained_in else "ok",
        "diverged_at": diverged_at,
        "untrained_in": untrained_in,
        "attempts": attempts,
        "collapsed": not untrained_in and has_collapsed(before.metrics[index], metrics),
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _diverged(pretraining: int | None, unlearning: int | None, after: dict[str, Any]) -> dict[str, Any] | None:
    """Where a seed's run ended early: `phase`, and `step` of it, from 0; None where it did not."""
    for phase, step in (("pretrain", pretraining), ("unlearn", unlearning)):
        if step is not None:
            return {"phase": phase, "step": step}
    return {"phase": "evaluate", "step": None} if after["retain_acc"] is None else None


def _untrained(method: Method, pretraining: bool, after: bool) -> str | None:
    """Which training of a seed learned nothing, "pretrain" or "retrain"; None where none did."""
    return "pretrain" if pretraining else RETRAIN if after and method.name == RETRAIN else None


def has_collapsed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether unlearning cost more than `COLLAPSE` of the accuracy on the retained classes."""
    both = before["retain_acc"], after["retain_acc"]
    return None not in both and both[0] - both[1] > COLLAPSE
