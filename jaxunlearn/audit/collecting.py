"""The models of an audit: those that are missing are made by ordinary runs, and of each what it says is read."""

import dataclasses
import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.audit.margins import retained_margin, true_class_margin
from jaxunlearn.errors import UserError, one_line
from jaxunlearn.evaluation.predictions import UNREADABLE, has_predictions
from jaxunlearn.progress import Reporter
from jaxunlearn.registry import RETRAIN, Method
from jaxunlearn.results import records
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.runs.request import Request
from jaxunlearn.runs.running import results

SETS = ("forget_train", "retain_train", "retain_test")
STATISTICS = ("true_class", "retained")  # which margin

Record = Mapping[str, Any]
Margins = dict[str, np.ndarray]  # by set: f64[models, images]


class Models(NamedTuple):
    """What models of a kind say, a row a seed."""

    seeds: list[int]
    worth: list[Record]  # metrics and companions
    margins: dict[str, Margins]  # by statistic

    def of(self, seeds: Sequence[int]) -> "Models":
        """Those of some of the seeds, in their order."""
        if list(seeds) == self.seeds:
            return self  # hundreds of megabytes, of hundreds of models
        rows = [self.seeds.index(seed) for seed in seeds]
        margins = {name: {part: x[rows] for part, x in sets.items()} for name, sets in self.margins.items()}
        return Models(list(seeds), [self.worth[row] for row in rows], margins)


def collect(request: Request, together: int, reporter: Reporter) -> Iterator[str]:
    """Runs what is missing of the request's methods, `retrain` being the first, so many seeds at a time.

    A model is there where its record is, of these settings and this rule, with what the model says. So the same command
    goes on where it was stopped, and takes what other runs have left. Yields warnings.

    Raises:
      UserError: as runs do, or there is a better record and what its model says is not known.
    """

    def missing(seed: int) -> list[Method]:
        return [method for method in request.methods if find(request, method, seed) is None]

    to_do = [seed for seed in request.seeds if missing(seed)]
    for path in (request.record_path(method, seed) for seed in to_do for method in missing(seed)):
        if not request.force and _knows_more(path):  # before anything is trained: a run would keep it
            remedy = "run bench with the same and --keep-predictions, or pass --force to replace it"
            raise UserError(
                f"{path} was evaluated in full or with --eval-every, and what its model says was not kept: {remedy}"
            )
    for first in range(0, len(to_do), together):
        seeds = to_do[first : first + together]
        if len(seeds) == 1 and _was_compared(request.record_path(request.methods[0], seeds[0])):
            # Alone it would have no other retrained model to be compared with, and the record would be kept for that.
            seeds += [seed for seed in request.seeds if seed not in seeds][:1]
        # Always with `retrain`, which the others are compared with: a record without that replaces none with it.
        wanted = {RETRAIN, *(method.name for seed in seeds for method in missing(seed))}
        chosen = [method for method in request.methods if method.name in wanted]
        run = dataclasses.replace(request, seeds=seeds, methods=chosen, keep_predictions=True)
        rest = reporter.repeated(math.ceil((len(to_do) - first) / together))
        yield from (kept for _, kept in results(prepare(run, rest)) if kept)
        gc.collect()  # programs hold each other: a gigabyte and more a group that Python would get round to late
        for seed in seeds:
            for method in missing(seed):
                path = request.record_path(method, seed)
                raise UserError(f"{path} was kept, and what its model says is not known: pass --force to replace it")


def find(request: Request, method: Method, seed: int) -> dict[str, Any] | None:
    """The record of a model that this request would make, if what the model says is there too or the model has failed.

    None where there is none such.
    """
    path = request.record_path(method, seed)
    if (record := _read(path)) is None:
        return None
    settings = json.loads(json.dumps([dataclasses.asdict(request.protocol), method.hyperparameters]))
    if [record["protocol"], record["hyperparameters"]] != settings or record["rule_digest"] != (method.source or None):
        return None
    if record["status"] != "ok":
        tries = record["attempts"].get(record["untrained_in"])  # of one that diverged, None
        return None if tries and tries < request.attempts else record
    known = [(path.with_suffix(".npz"), "finished_at", record["finished_at"])]
    if method.name == RETRAIN:  # a run on other images writes originals even where it has to keep the record
        known.append((request.originals_path(seed), "digest", record["dataset"]["digest"]))
    try:
        for file, name, value in known:
            with np.load(file) as said:
                if said[name] != value:
                    return None
    except UNREADABLE:
        return None
    return record


def _knows_more(path: Path) -> bool:
    """Whether there is a record of a model that says more than those of an audit do."""
    record = _read(path)
    if record is None or record["status"] != "ok":  # which a run replaces
        return False
    in_full = record["companions"] is not None and record["companions"]["full"] is not None
    return in_full or record["curves"]["evaluated"] is not None


def _was_compared(path: Path) -> bool:
    """Whether there is a record of a model beside which there was a retrained one."""
    record = _read(path)
    companions = record and record["companions"]
    return companions is not None and companions["against_retrain"] is not None


def _read(path: Path) -> dict[str, Any] | None:
    """A record, if it is there; where it cannot be read a run says what is wrong with it."""
    try:
        return records.read(path)
    except UserError:
        return None


def load(request: Request, method: Method) -> tuple[list[Record], Models]:
    """The records of a method, and what its models say but for those that failed, whose seeds are left out.

    Raises:
      UserError: a file cannot be read, or is not there any more.
    """
    made: dict[int, Record] = {}
    for seed in request.seeds:
        found = find(request, method, seed)
        if found is None:
            path = request.record_path(method, seed)
            raise UserError(f"{path} or what its model says is being written by another run: run the command again")
        made[seed] = found
    sound = {seed: record for seed, record in made.items() if record["status"] == "ok"}
    files = [request.record_path(method, seed).with_suffix(".npz") for seed in sound]
    return list(made.values()), _models(files, sound, request.protocol.forget_class)


def load_originals(request: Request, retrained: Sequence[Record]) -> Models:
    """What the pretrained models say, of those seeds of which neither they nor the retrained models failed.

    Raises:
      UserError: a file cannot be read.
    """
    before = {
        record["seed"]: record["before"]
        for record in retrained
        if record["status"] == "ok"
        and has_predictions(request.originals_path(record["seed"]), record["dataset"]["digest"])
    }
    return _models([request.originals_path(seed) for seed in before], before, request.protocol.forget_class)


def _models(files: Sequence[Path], worth: Mapping[int, Record], forget_class: int) -> Models:
    margins: dict[str, dict[str, list[np.ndarray]]] = {name: {part: [] for part in SETS} for name in STATISTICS}
    for file in files:
        try:
            with np.load(file) as said:
                kept = said["test_labels"] != forget_class
                answers = {name: (said[name], said[f"{name}_labels"]) for name in SETS[:2]}
                answers["retain_test"] = said["test"][kept], said["test_labels"][kept]
        except UNREADABLE as error:
            message = f"cannot read {file} ({one_line(error)}): remove it, and the same command makes it anew"
            raise UserError(message) from None
        for part, (log_p, labels) in answers.items():
            margins["true_class"][part].append(true_class_margin(log_p, labels))
            margins["retained"][part].append(retained_margin(log_p, forget_class))
    stacked = {name: {part: np.array(rows) for part, rows in sets.items()} for name, sets in margins.items()}
    return Models(list(worth), list(worth.values()), stacked)
