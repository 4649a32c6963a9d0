"""An audit: every attack on a method's models, beside the same on models that forgot nothing and that never knew."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.audit.collecting import SETS, STATISTICS, Margins, Models, Record, load, load_originals
from jaxunlearn.audit.forgetting_quality import forgetting_quality, forgetting_quality_ceiling
from jaxunlearn.audit.klom import klom_floor, klom_percentile
from jaxunlearn.audit.rmia import references_of, rmia_scores
from jaxunlearn.audit.separation import separation
from jaxunlearn.audit.ulira import folds_of, ulira_scores
from jaxunlearn.errors import UserError
from jaxunlearn.registry import RETRAIN, Method
from jaxunlearn.runs.command_line import audit_command
from jaxunlearn.runs.request import Request

VERSION = 1
FEWEST = 4  # models: two for each fit of U-LiRA


def audits(request: Request) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Each method of the request but `retrain`, which is the first, and its record.

    All models are there: `collect` has been gone through.

    Raises:
      UserError: files cannot be read, too few models did not fail, or they saw different images.
    """
    retrain, *methods = request.methods
    reference_records, reference = load(request, retrain)
    original = load_originals(request, reference_records)
    halves = [reference.of(reference.seeds[half::2]) for half in (0, 1)]
    shared = {"pretrained": attacked(original, reference), "retrained": attacked(*halves)}
    for method in methods:
        made, unlearned = load(request, method)
        if len({record["dataset"]["digest"] for record in (*made, *reference_records)}) > 1:
            raise UserError(f"{request.out}: {method.name} and {RETRAIN} saw different images: pass another --out")
        used = [seed for seed in unlearned.seeds if seed in reference.seeds]
        if len(used) < FEWEST:
            failed = f"of {len(request.seeds)} models only {len(used)} are sound"
            raise UserError(f"{method.name}: {failed}, and an audit needs {FEWEST}: take more --models")
        attacks = {
            "pretrained": shared["pretrained"],
            "unlearned": attacked(unlearned, reference),
            "retrained": shared["retrained"],
        }
        record = {
            "schema": VERSION,
            "bench": request.bench,
            "method": method.name,
            "models": len(request.seeds),
            "seeds": used,
            "attacks": attacks,
            "cost": _cost(reference_records, made),
            "protocol": made[0]["protocol"],
            "hyperparameters": method.hyperparameters,
            "rule_digest": method.source or None,
            "dataset": made[0]["dataset"],
            "command": audit_command(request, method),
            "environment": made[0]["environment"],
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        yield method, record


def attacked(unlearned: Models, retrained: Models) -> dict[str, Any] | None:
    """All attacks that are to tell models in the place of the unlearned from retrained ones; JSON values.

    Rows of both that have a seed in common are paired; where they have none in common, as the halves of the retrained
    models, they are paired in order.
    """
    common = [seed for seed in unlearned.seeds if seed in retrained.seeds]
    if common:
        unlearned, retrained = unlearned.of(common), retrained.of(common)
    count = min(len(unlearned.seeds), len(retrained.seeds))
    unlearned, retrained = unlearned.of(unlearned.seeds[:count]), retrained.of(retrained.seeds[:count])
    if count < 2:
        return None
    kept = float(np.prod([_accuracy(unlearned, which) / _accuracy(retrained, which) for which in (0, 1)]))
    return {
        "models": count,
        "population_auc": float(np.mean([worth["forget_mia_auc"] for worth in unlearned.worth])),
        **{name: attack_all(unlearned.margins[name], retrained.margins[name], kept) for name in STATISTICS},
    }


def attack_all(unlearned: Margins, retrained: Margins, kept: float) -> dict[str, Any]:
    """Every attack by one kind of margin; None where there are too few models for it.

    Args:
      unlearned, retrained: margins of N models each, N >= 2, those of one row paired, by set.
      kept: the ratio of accuracies, unlearned over retrained, on retained training images, times that on test images.
    """
    own, never = (margins["forget_train"] for margins in (unlearned, retrained))
    count, references, folds = len(own), references_of(len(own)), folds_of(len(own))
    ulira = rmia = None
    if folds > 1:
        ulira = {"folds": folds, **separation(*ulira_scores(own, never), threshold=0.0, folds=folds)}
    if count - references > 1:
        known = [retrained[name][:references] for name in ("forget_train", "retain_test")]
        scores = [
            rmia_scores(part["forget_train"][references:], part["retain_test"][references:], *known)
            for part in (unlearned, retrained)
        ]
        rmia = {"references": references, **separation(scores[0], scores[1])}
    quality = forgetting_quality(own, never)
    return {
        "ulira": ulira,
        "rmia": rmia,
        "klom": {name: klom_percentile(unlearned[name], retrained[name]) for name in SETS}
        | {"floor": klom_floor(count)},
        "forgetting_quality_of_originals": {
            "points": quality,
            "score": quality * kept,
            "ceiling": forgetting_quality_ceiling(never),
        },
    }


def _accuracy(models: Models, which: int) -> float:
    """Mean accuracy on retained training images (0) or test images (1)."""
    values = [one["retain_acc"] if which else one["companions"]["retain_train_acc"] for one in models.worth]
    return float(np.mean(values))


def _cost(retrained: Sequence[Record], made: Sequence[Record]) -> dict[str, Any]:
    """Seconds a model, as the records have them, and what follows."""

    def mean(records: Sequence[Record], *names: str) -> float:
        return float(np.mean([sum(record["timing"][name] or 0.0 for name in names) for record in records]))

    seconds: Mapping[str, float] = {
        "pretrain_s": mean(retrained, "pretrain_s"),
        "retrain_s": mean(retrained, "unlearn_s"),
        "unlearn_s": mean(made, "prepare_s", "unlearn_s"),
        "evaluate_s": mean(made, "evaluate_s", "companions_s"),
    }
    # Three models a seed, each of which is asked.
    total = sum(seconds.values()) + 2 * seconds["evaluate_s"]
    return {name: round(value, 3) for name, value in seconds.items()} | {
        "models_per_hour": round(3 * 3600 / total, 1) if total else None,
        "as_many_again_s": round(total * len(made), 1),
    }
