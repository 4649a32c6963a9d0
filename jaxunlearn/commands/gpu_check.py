"""Measure on a GPU what decides how the package runs there.

Each arm is a process of its own, with its environment and limit; one at a time compiles and measures. Prints a JSON
line a result as it comes, also to FILE, and at the end a table of what each arm decides. Takes no images but
scikit-learn's digits. Exit status: 0 what was run, ran and agrees with the CPU; 1 something did not; 2 the input is
wrong.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError, WriteError

INTERRUPTED = "interrupted"
MOST_ROWS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add(
        "--arms",
        type=Path,
        metavar="LIST",
        help="a file of LIMIT [NAME=VALUE ...] WORDS [# WHAT IT DECIDES], as in gpu_check/arms.py (default: its list)",
    )
    add("--seconds", type=float, default=360.0, metavar="S", help="of all arms together (default: %(default)g)")
    add(
        "--out",
        type=Path,
        default=Path("gpu_check.jsonl"),
        metavar="FILE",
        help="where lines are added (default: %(default)s)",
    )
    add("--tiny", action="store_true", help="tiny sizes and few arms, for a CPU: only to see that it works")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit status. Raises UserError."""
    from jaxunlearn.gpu_check.arms import DEFAULT, TINY, parse
    from jaxunlearn.gpu_check.schedule import run_arms

    if not 0 < args.seconds < float("inf"):
        raise UserError(f"--seconds {args.seconds}: it must be more than 0")
    try:
        text = args.arms.read_text(encoding="utf-8") if args.arms else TINY if args.tiny else DEFAULT
    except (OSError, ValueError) as error:
        raise UserError(f"--arms {args.arms}: {getattr(error, 'strerror', None) or 'not a text'}") from None
    arms, results = parse(text), []
    try:
        file = args.out.open("a", encoding="utf-8")
    except OSError as error:
        raise WriteError(f"--out {args.out}: {error.strerror}") from None

    def tell(result: dict[str, Any]) -> None:
        results.append(result)
        for target in (None, file):
            print(json.dumps(result), file=target, flush=True)

    with file:
        run_arms(arms, args.seconds, tell, ["--tiny"] if args.tiny else [])
    print_table(results, {arm.name: arm.decides for arm in arms})
    return int(any("error" in result or result.get("ok") is False for result in results))


def print_table(results: list[dict[str, Any]], decides: dict[str, str]) -> None:
    """A line a result, in the order of the arms."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading, width in (("arm", 78), ("result", 100), ("decides", None)):
        table.add_column(heading, no_wrap=True, max_width=width)
    names = list(decides)
    rows = sorted(results, key=lambda result: names.index(result["arm"]))
    for result in rows[:MOST_ROWS]:
        name = ": ".join(filter(None, (result["arm"], result.get("form"))))
        table.add_row(name, summary(result), decides[result["arm"]])
    console = Console(width=260, markup=False, highlight=False)
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"and {len(rows) - MOST_ROWS} more in the file")


def summary(result: dict[str, Any]) -> str:
    """What of a result is shown."""
    for name in ("error", "skipped"):
        if name in result:
            return f"{name}: {result[name]}"
    if "ok" in result:
        worst = "; ".join(f"{name} {max(result[name].values()):.1e}" for name in ("highest", "default"))
        return f"{'as it should be' if result['ok'] else 'OUT'}: {worst}"
    hidden = ("arm", "seconds", "form", "calls", "transposes", "longest", "loss", "device")
    return ", ".join(f"{name} {value}" for name, value in result.items() if name not in hidden)
