"""What makes a record of a run: `results/schema.json` says what each field is."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from jaxunlearn.evaluation.flags import flags
from jaxunlearn.evaluation.metrics import diverged_metrics
from jaxunlearn.registry import RETRAIN, Method
from jaxunlearn.results.schema import VERSION
from jaxunlearn.runs.command_line import command_of
from jaxunlearn.runs.preparation import Prepared
from jaxunlearn.runs.scoring import ON_THE_WAY
from jaxunlearn.training.pretrained import Models

Worth = Mapping[str, Any]  # metrics, and companions


def make_record(
    run: Prepared,
    method: Method,
    index: int,
    models: tuple[Models, Models],
    worth: tuple[Worth, Worth, Worth | None],
    steps: int,
    common: Mapping[str, float],
) -> dict[str, Any]:
    """The record of the model at `index`, of a method's group: draws of all seeds in a row. JSON values.

    Args:
      models: the pretrained ones and the method's.
      worth: of the pretrained model of this seed, of the method's, and of the retrained one that it is compared with.
      steps: of the method.
      common: seconds that all methods share, by what they were spent on; `run.timing` has this method's.
    """
    request, timing, count = run.request, run.timing, len(run.request.seeds)
    draw, i = index // count % request.draws(method), index % count
    pretrained, unlearned = models[0].outcomes[i], models[1].outcomes[index]
    before, after, retrained = worth
    shares = len(models[1].outcomes)  # of what all models of this method took together
    pretrain_s, prepare_s = pretrained.seconds, unlearned.prepared
    unlearn_s = unlearned.seconds - prepare_s
    images = sum(run.batches(len(run.train.labels), "training")) * request.protocol.pretrain_epochs
    alone = method.name == RETRAIN  # it does not begin with the pretrained model, whatever became of that
    diverged_at = _diverged(None if alone else pretrained.diverged, unlearned.diverged, after)
    result = diverged_metrics() | {"companions": None} if diverged_at else after
    untrained_in = RETRAIN if alone and unlearned.untrained and not diverged_at else None
    if pretrained.untrained and not alone:  # as it is, whatever became of it beside others
        untrained_in, diverged_at = "pretrain", None
        result, prepare_s, unlearn_s = before, 0.0, 0.0
    attempts = {"pretrain": pretrained.attempts}
    attempts |= {RETRAIN: unlearned.attempts} if alone else {}
    marks = flags(before, result, retrained, *run.evaluator.counts)
    if untrained_in or not (alone or pretrained.sound):
        steps = 0  # there was nothing to begin with
    seconds = {
        "data_s": common["data_s"],
        "compile_s": common.get("compile_s", 0.0) + timing.get("compile_s", 0.0),
        "pretrain_s": pretrain_s,
        "prepare_s": prepare_s,
        "unlearn_s": unlearn_s,
        "evaluate_s": timing["evaluate_s"] / shares,
        "companions_s": timing.get("companions_s", 0.0) / shares,
        "checkpoint_s": common.get("checkpoint_s", 0.0) / count + timing.get("checkpoint_s", 0.0) / shares,
    }
    trained_on = {"pretrain": list(pretrained.devices), "unlearn": list(unlearned.devices)}
    throughput = {
        "pretrain_images_per_s": images / pretrain_s if pretrain_s and pretrained.sound else None,
        "unlearn_steps_per_s": steps / unlearn_s if steps and unlearn_s and unlearned.sound else None,
    }
    return {
        "schema": VERSION,
        "bench": request.bench,
        "method": method.name,
        "seed": request.seeds[i],
        "unlearn_seed": draw,
        **result,
        "before": dict(before),
        "curves": {
            "pretrain": pretrained.curves or None,
            "unlearn": unlearned.curves or None,
            "evaluated": None
            if untrained_in
            else _evaluated(run, method, steps, (before, result), unlearned.evaluated),
        },
        "scored": "last",
        "flags": dict.fromkeys(marks) | {"collapsed": False} if untrained_in else marks,
        "unlearn_steps": steps,
        "protocol": dataclasses.asdict(request.protocol),
        "hyperparameters": method.hyperparameters,
        "rule_digest": method.source or None,
        "command": command_of(request, method),
        "dataset": {"digest": run.digest, "verified": run.verified},
        "timing": {name: round(value, 3) for name, value in seconds.items()},
        "throughput": {name: rate and round(rate, 3) for name, rate in throughput.items()},
        "environment": run.environment | {"trained_on": trained_on},
        "status": "diverged" if diverged_at else "untrained" if untrained_in else "ok",
        "diverged_at": diverged_at,
        "untrained_in": untrained_in,
        "attempts": attempts,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _evaluated(
    run: Prepared, method: Method, steps: int, ends: tuple[Worth, Worth], between: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a model was worth before its first epoch, on the way and after the last; None where nobody asked, where
    there are no epochs, and of `retrain`, which begins elsewhere."""
    if not run.request.eval_every or not steps or method.name == RETRAIN:
        return None
    first, last = ends
    return {"epoch": [0, *between.get("epoch", []), run.request.protocol.unlearn_epochs]} | {
        name: [first[name], *between.get(name, []), last[name]] for name in ON_THE_WAY
    }


def _diverged(pretraining: int | None, unlearning: int | None, after: Worth) -> dict[str, Any] | None:
    """Where a seed's run ended early: `phase`, and `step` of it, from 0; None where it did not."""
    for phase, step in (("pretrain", pretraining), ("unlearn", unlearning)):
        if step is not None:
            return {"phase": phase, "step": step}
    return {"phase": "evaluate", "step": None} if after["retain_acc"] is None else None
