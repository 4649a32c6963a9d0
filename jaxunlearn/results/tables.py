"""The closing table: this run's results, ranked, above the benchmark's published ones."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from jaxunlearn.errors import printable
from jaxunlearn.evaluation.metrics import auc_standard_error

SHOWN = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score", "symmetric_score")
# Of output that is no terminal (a file, a pipe): every table fits, one line a row.
FILE_WIDTH = 200


class Row(NamedTuple):
    """One line of the table: a method with one set of hyperparameters, over its seeds."""

    method: str
    variant: str  # 'name=value ...' of the hyperparameters that are not the method's defaults, else ''
    seeds: int
    diverged: int  # seeds of them that diverged: counted, never averaged
    untrained: int  # seeds of them of whose models one learned nothing: averaged only where all are such
    collapsed: int  # seeds of them that lost more than ten points on the retained classes: counted and averaged
    mean: dict[str, float]  # by metric, over the seeds that count; empty if all diverged
    std: dict[str, float]  # sample standard deviation (n - 1); empty below two such seeds
    seconds: float | None  # mean over all seeds, unlearning and evaluation

    @property
    def ranked(self) -> bool:
        """Whether it has a seed that learned and did not diverge."""
        return self.seeds > self.diverged + self.untrained


def summarize(records: Sequence[Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a method and variant, best mean `symmetric_score` first, rows of which no seed counts last.

    Before them comes `pretrained`, the model that each seed started from (`before`), if any record has one.

    Args:
      records: result records of one benchmark and protocol.
      defaults: hyperparameters of each method when nothing is set; those of a method not named here are all shown.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        usual = defaults.get(record["method"], {})
        changed = {k: v for k, v in record["hyperparameters"].items() if k not in usual or usual[k] != v}
        variant = printable(" ".join(f"{name}={value}" for name, value in changed.items()))
        groups.setdefault((record["method"], variant), []).append(record)
    rows = [
        _row(*key, group, sum(r["timing"]["unlearn_s"] + r["timing"]["evaluate_s"] for r in group) / len(group))
        for key, group in groups.items()
    ]
    rows.sort(key=lambda row: -row.mean["symmetric_score"] if row.ranked else float("inf"))
    # The methods of one seed share a pretrained model: it counts once.
    before = {record["seed"]: _before(record) for record in records if record["before"]}
    return [_row("pretrained", "", list(before.values()), None), *rows] if before else rows


def load_published() -> dict[str, Any]:
    """The published results, as fractions; areas in them follow the published tie rule (`metrics.published_auc`).

    Returns:
      `source`, `legend` (what the groups are), `columns` (what the values are), `groups` [{`label`, `digits` (decimals
      they were published with), `results`: benchmark -> method -> values}], `notes`: benchmark -> remark.
    """
    return json.loads(resources.files("jaxunlearn.results").joinpath("published.json").read_text(encoding="utf-8"))


def print_results(
    records: Sequence[Mapping[str, Any]],
    *,
    defaults: Mapping[str, Mapping[str, Any]],
    members: int,
    non_members: int,
    file: TextIO | None = None,
) -> None:
    """Prints `summarize(records, defaults)`, how to read it, and the benchmark's published results if it has any.

    A cell is a fraction, over several seeds mean and sample standard deviation. On a terminal too narrow for that on
    one line the deviation goes below the mean. An `unlearn_score` above that of the best `retrain` row is starred.

    Args:
      records: as for `summarize`, at least one.
      defaults: as for `summarize`.
      members: training images of the forget class that the attack scored; `non_members`: test images of it.
      file: where to; standard output if None.
    """
    # Names come from users and files: no markup, no emoji codes.
    # A file gets plain text, also in a notebook, where rich would display it, and where the environment forces colours.
    interactive = None if file is None else file.isatty()
    jupyter = None if file is None else False
    console = Console(
        file=file, force_terminal=interactive, force_jupyter=jupyter, markup=False, emoji=False, highlight=False
    )
    if not console.is_terminal:
        console.width = FILE_WIDTH
    rows = summarize(records, defaults)
    retrain = [row.mean["unlearn_score"] for row in rows if row.method == "retrain" and row.ranked]
    ceiling = max(retrain, default=float("inf"))
    starred = [row for row in rows if row.ranked and row.mean["unlearn_score"] > ceiling and row.method != "pretrained"]
    error = auc_standard_error(members, non_members)
    bench = records[0]["bench"]

    def results(joint: str) -> Table:
        plus_minus = "±" if console.encoding.startswith("utf") else "+-"
        lines = [_cells(row, joint + plus_minus, joint, starred) for row in rows]
        return _table([*SHOWN, "seeds", "seconds"], lines, joint)

    precision, device = records[0]["protocol"]["precision"], records[0]["environment"]["device_kind"]
    console.print(f"{bench}, best symmetric_score first ({precision}, {device})", style="bold")
    _print_table(console, results)
    if redrawn := _redrawn(records):
        console.print(f"Drawn again, since nothing had been learned at first: {redrawn}")
    if starred:
        console.print("* above retraining from scratch: inverted membership, not better forgetting")
    console.print(
        f"Standard error of an AUC near 0.5 with {members} members and {non_members} non-members: {error:.4f}, "
        f"which is {error / 3:.4f} of unlearn_score and up to {2 * error / 3:.4f} of symmetric_score. "
        "Smaller differences are ties."
    )

    published = load_published()
    lines = [
        [method, *(f"{value:.{group['digits']}f}" for value in values), group["label"]]
        for group in published["groups"]
        for method, values in group["results"].get(bench, {}).items()
    ]
    if lines:
        console.print("\nPublished results", style="bold")
        _print_table(console, lambda joint: _table([*published["columns"], "from"], lines, joint))
        console.print(published["source"])
        console.print(published["legend"])
        if bench in published["notes"]:
            console.print(published["notes"][bench])


def _before(record: Mapping[str, Any]) -> dict[str, Any]:
    return record["before"] | {"status": "untrained" if record.get("untrained_in") == "pretrain" else "ok"}


def _redrawn(records: Sequence[Mapping[str, Any]]) -> str:
    """Which models were drawn again, once each."""
    counts = {
        (phase, record["seed"]): count
        for record in records
        for phase, count in record.get("attempts", {}).items()
        if count > 1
    }
    return ", ".join(f"{phase} of seed {seed} (attempt {count})" for (phase, seed), count in counts.items())


def _row(method: str, variant: str, metrics: Sequence[Mapping[str, Any]], seconds: float | None) -> Row:
    finite = [values for values in metrics if values["symmetric_score"] is not None]
    diverged, learned = len(metrics) - len(finite), [v for v in finite if v.get("status") != "untrained"]
    untrained, finite = len(finite) - len(learned), learned or finite
    columns = {name: [values[name] for values in finite] for name in SHOWN}
    return Row(
        method=method,
        variant=variant,
        seeds=len(metrics),
        diverged=diverged,
        untrained=untrained,
        collapsed=sum(values.get("collapsed", False) for values in metrics),
        mean={name: statistics.fmean(column) for name, column in columns.items()} if finite else {},
        std={name: statistics.stdev(column) for name, column in columns.items()} if len(finite) > 1 else {},
        seconds=seconds,
    )


def _cells(row: Row, plus_minus: str, joint: str, starred: Sequence[Row]) -> list[str]:
    cells = [joint.join(filter(None, (row.method, row.variant)))]
    for name in SHOWN:
        cell = f"{row.mean[name]:.4f}" if row.mean else "-"
        if name == "unlearn_score" and row in starred:
            cell += "*"
        cells.append(cell + (f"{plus_minus}{row.std[name]:.4f}" if row.std else ""))
    if row.diverged == row.seeds:
        cells[1] = "diverged"
    states = [(row.diverged, "diverged"), (row.untrained, "untrained"), (row.collapsed, "collapsed")]
    counted = joint.join(f"{count} of {row.seeds}{joint}{state}" for count, state in states if count)
    return [*cells, counted or str(row.seeds), "-" if row.seconds is None else f"{row.seconds:.1f}"]


def _table(columns: Iterable[str], lines: Iterable[Sequence[str]], joint: str) -> Table:
    """A table of a method and `columns`; a `joint` that is a line break also breaks the names of the columns in two."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, int(joint == " "), 0, 0))
    table.add_column("method", overflow="fold")
    for name in columns:
        table.add_column(name.replace("_", "_\n", 1) if joint == "\n" else name, justify="right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _print_table(console: Console, build: Callable[[str], Table]) -> None:
    """Prints `build(" ")` if it fits the width, else `build("\\n")`."""
    wide = build(" ")
    unlimited = console.options.update(max_width=10_000)
    console.print(wide if console.measure(wide, options=unlimited).maximum <= console.width else build("\n"))
