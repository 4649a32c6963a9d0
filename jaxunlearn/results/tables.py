"""The closing table: this run's results, ranked, above the benchmark's published ones."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from jaxunlearn.evaluation.metrics import auc_standard_error
from jaxunlearn.results import published
from jaxunlearn.results.rows import ONE_ORIGINAL, SHOWN, WORDS, Row, summarize

# Of output that is no terminal (a file, a pipe): every table fits, one line a row.
FILE_WIDTH = 200
SHORT = {"forget_mia_auc_augmented": "auc_augmented", "average_gap": "avg_gap"}
COLUMNS = ("rank", "method", *(SHORT.get(name, name) for name in SHOWN), "seeds", "seconds", "flags")
# Of a terminal that is too narrow for all of them: two tables, the scores and what is to be known of them.
PARTS = (COLUMNS[:8], ("method", *COLUMNS[8:]))


def table_console(file: TextIO | None = None, width: int = FILE_WIDTH) -> Console:
    """Where a table is printed: `file`, or standard output. `width`, in columns, is of output that is no terminal."""
    # Names come from users and files: no markup, no emoji codes.
    # A file gets plain text, also in a notebook, where rich would display it, and where the environment forces colours.
    interactive = None if file is None else file.isatty()
    jupyter = None if file is None else False
    console = Console(
        file=file, force_terminal=interactive, force_jupyter=jupyter, markup=False, emoji=False, highlight=False
    )
    if not console.is_terminal:
        console.width = width
    return console


def print_results(
    records: Sequence[Mapping[str, Any]],
    *,
    defaults: Mapping[str, Mapping[str, Any]],
    members: int,
    non_members: int,
    file: TextIO | None = None,
) -> None:
    """Prints `summarize(records, defaults)`, how to read it, and the benchmark's published results if it has any.

    A cell is a fraction, over several seeds the mean and the half width of its 95% t-interval. On a terminal too narrow
    for that on one line the half width goes below the mean; on one too narrow for that too the table is two.

    Args:
      records: as for `summarize`, at least one.
      defaults: as for `summarize`.
      members: training images of the forget class that the attack scored; `non_members`: test images of it.
      file: where to; standard output if None.
    """
    console = table_console(file)
    plus_minus = "±" if console.encoding.startswith("utf") else "+-"
    rows = summarize(records, defaults)
    repeated = any(row.half_width for row in rows)
    bench = records[0]["bench"]

    precision, device = records[0]["protocol"]["precision"], records[0]["environment"]["device_kind"]
    images = ", validation images" if records[0]["protocol"].get("validation") else ""
    console.print(f"{bench}, best symmetric_score first ({precision}, {device}{images})", style="bold")
    _print_table(console, COLUMNS, lambda joint: [_cells(row, joint, plus_minus) for row in rows], PARTS)
    if repeated:
        console.print(f"{plus_minus} is half the 95% t-interval of the mean over seeds.")
    given = bool(records[0]["protocol"].get("init_weights"))
    if given and (repeated or any(row.spread for row in rows)):
        console.print(ONE_ORIGINAL)
    for line in _remarks(rows):
        console.print(line)
    if redrawn := _redrawn(records):
        console.print(f"Drawn again, since nothing had been learned at first: {redrawn}")
    error = auc_standard_error(members, non_members)
    shared = f"All seeds share these images: {plus_minus} leaves it out."
    console.print(
        f"Standard error of an AUC near 0.5 with {members} members and {non_members} non-members: {error:.4f}, "
        f"which is {error / 3:.4f} of unlearn_score and up to {2 * error / 3:.4f} of symmetric_score. "
        f"{shared if repeated else 'Smaller differences are ties.'}"
    )
    console.print("What the columns mean: docs/metrics.md")
    if spread := [[_name(row, " "), *map(_deviation, row.spread[:2])] for row in rows if row.spread]:
        console.print("\nDeviation of symmetric_score over originals, and over unlearnings of one", style="bold")
        if given:  # of one original: there is no deviation over several
            spread = [[name, over_unlearnings] for name, _, over_unlearnings in spread]
        columns = ("method", *(() if given else ("s_train",)), "s_unlearn")
        _print_table(console, columns, lambda joint: spread)

    if lines := _published_lines(bench):
        facts = published.load()
        console.print("\nPublished results", style="bold")
        _print_table(console, ("method", *facts["columns"], "from"), lambda joint: lines)
        console.print(facts["source"])
        console.print(facts["legend"])
        if bench in facts["notes"]:
            console.print(facts["notes"][bench])


def _published_lines(bench: str) -> list[list[str]]:
    """The cells of the published baselines and of the submission with the highest score."""
    rows = published.rows_of(bench)
    best = max(rows, key=lambda row: (row.kind != "baseline", row.values["unlearn_score"]), default=None)
    return [
        [
            f"{row.name} ({row.kind})" if row is best else row.name,
            *(f"{value:.{row.digits}f}" for value in row.values.values()),
            "best submitted" if row is best else row.table,
        ]
        for row in rows
        if row.kind == "baseline" or row is best
    ]


def _remarks(rows: Sequence[Row]) -> Iterable[str]:
    """What is to be known to read these rows, a line each."""
    if any(row.rank for row in rows):
        yield "Rows share a rank where the 95% interval of their paired difference from its first holds zero."
    if unranked := [row for row in rows if row.learned and not row.reference and row.rank is None]:
        alone = not any(row.rank for row in rows)
        names = ", ".join(_name(row, " ") for row in unranked)
        yield "With one seed nothing is ranked." if alone else f"Of too few seeds to be ranked: {names}"
    if any(row.reference for row in rows):
        yield "ref: a reference, to compare with; it has no rank"
    for name, (word, meaning) in WORDS.items():
        if any(row.flags[name] for row in rows):
            yield f"{word}: {meaning}"


def _redrawn(records: Sequence[Mapping[str, Any]]) -> str:
    """Which models were drawn again, once each."""
    counts = {
        (phase, record["seed"]): count
        for record in records
        for phase, count in record.get("attempts", {}).items()
        if count > 1
    }
    return ", ".join(f"{phase} of seed {seed} (attempt {count})" for (phase, seed), count in counts.items())


def _name(row: Row, joint: str) -> str:
    return joint.join(filter(None, (row.method, row.variant)))


def _cells(row: Row, joint: str, plus_minus: str) -> list[str]:
    values = [f"{row.mean[name]:.4f}" if name in row.mean else "-" for name in SHOWN]
    widths = [f"{joint}{plus_minus}{row.half_width[name]:.4f}" if name in row.half_width else "" for name in SHOWN]
    values = [value + width.removeprefix(" ") for value, width in zip(values, widths, strict=True)]
    if row.diverged == row.runs:
        values[0] = "diverged"
    states = [(row.diverged, "diverged"), (row.untrained, "untrained")]
    counted = joint.join(f"{count} of {row.runs}{joint}{state}" for count, state in states if count)
    seeds = str(row.seeds) if row.runs == row.seeds else f"{row.seeds}{joint}({row.runs} runs)"
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    rank = "ref" if row.reference else str(row.rank or "-")
    return [rank, _name(row, joint), *values, counted or seeds, seconds, ", ".join(row.said)]


def _deviation(variance: float | None) -> str:
    return "-" if variance is None else f"{math.sqrt(variance):.4f}"


def _print_table(
    console: Console,
    columns: Sequence[str],
    lines: Callable[[str], Sequence[Sequence[str]]],
    parts: Sequence[Sequence[str]] = (),
) -> None:
    """Prints a table in the widest form that fits: loose, tight, flags broken, all cells broken, in several `parts`.

    Args:
      columns: their names, no two alike.
      lines: the cells of each row; a cell's pieces joined by what it is given, a space or a line break.
      parts: the columns of the tables that stand in for one.
    """
    whole = (columns,)
    forms = (
        (" ", 1, None, whole),
        (" ", 0, None, whole),
        (" ", 0, 30, whole),
        ("\n", 0, 14, whole),
        ("\n", 0, None, parts or whole),
    )
    unlimited = console.options.update(max_width=10_000)
    for joint, space, flags_width, shown in forms:
        rows = [dict(zip(columns, line, strict=True)) for line in lines(joint)]
        tables = [_table(part, rows, joint, space, flags_width) for part in shown]
        if all(console.measure(table, options=unlimited).maximum <= console.width for table in tables):
            break
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)


def _table(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], joint: str, space: int, flags_width: int | None
) -> Table:
    """A `joint` that is a line break also breaks the names of the columns in two; `space` is what cells get besides."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, space, 0, 0))
    for name in columns:
        table.add_column(
            name.replace("_", "_\n", 1) if joint == "\n" else name,
            justify="left" if name in ("rank", "method", "flags") else "right",
            overflow="fold",
            max_width=flags_width if name == "flags" else None,
        )
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table
