"""One method's tuning, and the file that it is kept in: `OUT/tuning/<bench>/<method>.json`, by `schema.json`."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jaxunlearn.errors import UserError, one_line
from jaxunlearn.files import AGAIN, check_writable, write_atomically, writing
from jaxunlearn.registry import Method
from jaxunlearn.results import records as result_records
from jaxunlearn.results import schema
from jaxunlearn.runs.command_line import tune_command
from jaxunlearn.runs.request import Request
from jaxunlearn.tuning.ranges import points, ranges_of

SETTINGS = ("bench", "method", "rule_digest", "protocol", "seeds", "unlearn_seeds", "held", "ranges")
SHOWN = ("retain_acc", "forget_acc", "forget_mia_auc")  # beside the gaps, of each trial


class Study(NamedTuple):
    """What is to be tried of one method, and what is known of it: JSON values, as they are in its file."""

    method: Method
    path: Path
    wanted: list[dict[str, Any]]  # hyperparameters, the method's own first
    content: dict[str, Any]

    @property
    def pending(self) -> list[Method]:
        """The variants of the method that are still to be tried, or again: no seed of theirs had models to compare."""
        done = [
            trial["hyperparameters"]
            for trial in self.content["trials"]
            if trial["counted"] > 0 or trial["status"] == "diverged"
        ]
        return [self.method._replace(hyperparameters=one) for one in self.wanted if _plain(one) not in done]


def study_of(request: Request, method: Method, trials: int, held: Collection[str], asked: Mapping[str, str]) -> Study:
    """The study of a method by a request, of at most so many trials, of which nothing is known yet.

    Args:
      held: hyperparameters that the user has set: they are not varied.
      asked: ranges that the user wants, as typed.

    Raises UserError for a range that is none.
    """
    ranges = ranges_of(method, asked, held)
    settings = {
        "bench": request.bench,
        "method": method.name,
        "rule_digest": method.source or None,
        "protocol": request.changes,
        "seeds": list(request.seeds),
        "unlearn_seeds": request.draws(method),
        "held": {name: method.hyperparameters[name] for name in held},
        "ranges": ranges,
    }
    known: dict[str, Any] = {"trials": [], "best": None, "dataset": None, "environment": None}
    content = _plain(settings) | known | {"command": tune_command(request, method, trials, held, asked)}
    path = request.out / "tuning" / request.bench / f"{method.name}.json"
    return Study(method, path, points(method, ranges, trials), content)


def resumed(study: Study, force: bool) -> Study:
    """The study with the trials that its file has.

    A file of other settings is refused; with `force` it gets another name, and the study begins anew.

    Raises UserError for that, for what is no such file, and where none can be written.
    """
    path, content = study.path, study.content
    check_writable(path.parent)
    if not path.is_file():
        return study
    try:
        found = result_records.parse(path)
        schema.check(found, "tuning")
        differs = [name for name in SETTINGS if found[name] != content[name]]
    except ValueError as error:
        found, differs = {}, [f"it is no file of tuning's: {error}"]
    if not differs:
        known = {name: found.get(name) for name in ("trials", "dataset", "environment")}
        return study._replace(content=content | known | {"best": best_of(found["trials"])})
    if not force:
        there = "; ".join(
            f"{name}: {json.dumps(found[name])} there, {json.dumps(content[name])} here" if name in found else name
            for name in differs
        )
        remedy = "pass --force to put that file aside and begin anew, or another --out"
        raise UserError(f"{path} is of other settings ({there}): {remedy}")
    try:
        path.rename(path.with_name(f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.json"))
    except OSError as error:
        raise UserError(f"cannot put {path} aside: {one_line(error)}") from None
    return study


def with_trial(study: Study, records: Sequence[Mapping[str, Any]]) -> Study:
    """The study with one more trial, whose records these are, in place of one of the same hyperparameters."""
    new = _plain(trial_of(records))
    trials = [*(one for one in study.content["trials"] if one["hyperparameters"] != new["hyperparameters"]), new]
    order = [_plain(one) for one in study.wanted]
    trials.sort(key=lambda one: order.index(one["hyperparameters"]) if one["hyperparameters"] in order else len(order))
    known = {name: records[0][name] for name in ("dataset", "environment")}
    return study._replace(content=study.content | known | {"trials": trials, "best": best_of(trials)})


def check_images(study: Study, digest: str) -> None:
    """Raises UserError where the study's trials were evaluated on a data set of another digest: they do not compare."""
    known = study.content["dataset"]
    if known is not None and known["digest"] != digest:
        raise UserError(f"{study.path} has trials that saw other images: pass another --out")


def save(study: Study) -> None:
    """Writes the study's file. Raises WriteError where it cannot."""
    with writing(study.path, AGAIN):
        write_atomically(study.path, (json.dumps(study.content, indent=2, allow_nan=False) + "\n").encode())


def trial_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of one variant's records: means over those that are `ok` and have a retrained model beside them.

    Where unlearning has diverged once, `status` is "diverged"; a seed that had no model to begin with does not count.
    """
    fine = [one for one in records if one["status"] == "ok" and one["companions"]["against_retrain"] is not None]
    against = [one["companions"]["against_retrain"] for one in fine]
    lost = [one for one in records if one["diverged_at"] and one["diverged_at"]["phase"] != "pretrain"]
    status = "diverged" if lost else "ok" if fine else records[0]["status"]
    flagged = Counter(name for one in fine for name, raised in one["flags"].items() if raised)
    return {
        "hyperparameters": records[0]["hyperparameters"],
        "average_gap": _mean([one["average_gap"] for one in against]),
        "gaps": {name: _mean([one["gaps"][name] for one in against]) for name in against[0]["gaps"]} if fine else None,
        **{name: _mean([one[name] for one in fine]) for name in SHOWN},
        "flags": dict(flagged),  # by flag, in how many records
        "status": status,
        "records": len(records),
        "counted": len(fine),
        "seconds": _mean([one["timing"]["prepare_s"] + one["timing"]["unlearn_s"] for one in records]),
    }


def best_of(trials: Sequence[Mapping[str, Any]]) -> int | None:
    """Which trial has the smallest average gap of those in which nothing diverged or collapsed; None: there is none."""
    fit = [
        i
        for i, one in enumerate(trials)
        if one["status"] == "ok" and one["average_gap"] is not None and "collapsed" not in one["flags"]
    ]
    return min(fit, key=lambda i: trials[i]["average_gap"], default=None)


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 6) if values else None


def _plain(value: Any) -> Any:
    """The value as it comes out of a file."""
    return json.loads(json.dumps(value))
