"""What a user sees of a study: its trials, the best first, and the command that runs that one on the test images."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.table import Table

from jaxunlearn.registry import RETRAIN, get_method
from jaxunlearn.results.tables import WORDS, table_console
from jaxunlearn.runs.command_line import command_of
from jaxunlearn.runs.request import Request
from jaxunlearn.tuning.studies import SHOWN, Study


def print_study(study: Study, request: Request, file: TextIO | None = None) -> None:
    """Prints the trials of a study, smallest average gap first, to `file` or standard output."""
    console = table_console(file)
    trials, best = study.content["trials"], study.content["best"]
    count = "1 trial" if len(trials) == 1 else f"{len(trials)} trials"
    fixed = "" if study.content["ranges"] else "; it has nothing to tune"
    console.print(f"{request.bench}, {study.method.name}: {count} on validation images{fixed}", style="bold")
    varied = list(study.content["ranges"])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("trial", *varied, "average_gap", *SHOWN, "seconds", "remarks"):
        table.add_column(name, justify="left" if name == "remarks" else "right", overflow="fold")
    for number in sorted(range(len(trials)), key=lambda i: (i != best, _order(trials[i]))):
        one = trials[number]
        values = [f"{one['hyperparameters'][name]:g}" for name in varied]
        measured = [_shown(one[name]) for name in ("average_gap", *SHOWN)]
        remarks = ", ".join([*(["best"] if number == best else []), *_remarks(number, one)])
        table.add_row(str(number), *values, *measured, f"{one['seconds']:.1f}", remarks)
    console.print(table)
    if best is None:
        console.print("No trial can be chosen: each has diverged, collapsed or no retrained model to compare with.")
    else:
        console.print(f"The best on the test images: {command_of_best(study, request)}", soft_wrap=True)


def command_of_best(study: Study, request: Request) -> str | None:
    """The command that runs the best trial's hyperparameters without validation images, beside `retrain`."""
    chosen = study.content["trials"][study.content["best"]]["hyperparameters"]
    varied = {name: chosen[name] for name in study.content["ranges"]}
    best = study.method._replace(hyperparameters=study.method.hyperparameters | varied)
    protocol = dataclasses.replace(request.protocol, validation=False)
    return command_of(dataclasses.replace(request, protocol=protocol, methods=[get_method(RETRAIN), best]), best)


def _order(trial: Mapping[str, Any]) -> float:
    return float("inf") if trial["average_gap"] is None else trial["average_gap"]


def _remarks(number: int, trial: Mapping[str, Any]) -> list[str]:
    counted = [] if trial["counted"] == trial["records"] else [f"{trial['counted']} of {trial['records']} runs counted"]
    status = [] if trial["status"] == "ok" else [trial["status"]]
    flags = [WORDS[name][0] for name in trial["flags"]]
    return [*(["defaults"] if number == 0 else []), *status, *flags, *counted]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
