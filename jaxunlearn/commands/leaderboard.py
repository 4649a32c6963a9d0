"""Make tables of many runs from their records.

A table for each benchmark and protocol, ranked, with the rows that are published for it. Records are read and nothing
else: anybody's will do. What is no record is named on stderr, in a line, and left out. Exit status: 0 done; 2 the
input is wrong, as where there is no record at all; 1 anything else.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from jaxunlearn.commands.parser import Parser
from jaxunlearn.errors import UserError
from jaxunlearn.files import write_atomically, writing

INTERRUPTED = "interrupted"
TABLES = ("results", "short", "published", "readings", "rules")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="RESULTS", help="folders of records, and records (default: runs)")
    add(
        "--table",
        choices=TABLES,
        help="results: all that is known; short: the scores; published: do the published values agree with ours? "
        "readings: what did the published attack see? rules: what those that ship read, change and set "
        f"(default: {TABLES[0]})",
    )
    add("--format", choices=("markdown", "csv", "json"), help="(default: markdown)")
    add(
        "--update",
        nargs="+",
        type=Path,
        metavar="FILE.md",
        help="make anew, in these files, what stands between lines '<!-- leaderboard: ARGUMENTS -->' and "
        "'<!-- end -->'; the arguments are this command's, its paths relative to where it is run",
    )


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Raises UserError."""
    if not args.update:
        _print(_table(args))
        return 0
    if args.results or args.table or args.format:
        raise UserError("--update takes no records, --table or --format: the files say what their tables are")
    texts = {path: _read(path) for path in args.update}
    for path, text in {path: updated(text, str(path)) for path, text in texts.items()}.items():
        if text != texts[path]:
            with writing(path):
                write_atomically(path.resolve(), text.encode())  # of a link, what it leads to
            _print(f"updated {path}\n")
    return 0


def updated(text: str, name: str) -> str:
    """A Markdown text with all its tables made anew. Raises UserError, which begins with the `name` of the text."""
    from jaxunlearn.results.marked import remade

    return remade(text, name, _of_words)


def _of_words(words: str) -> str:
    parser = Parser(add_help=False)  # it would end the command
    add_arguments(parser)
    try:
        args = parser.parse_args(shlex.split(words))
    except ValueError as error:
        raise UserError(f"'{words}': {error}") from None
    if args.update:
        raise UserError("--update cannot stand in a file that is updated")
    return _table(args)


def _table(args: argparse.Namespace) -> str:
    # Here, because JAX takes a second to import and `--help` should not.
    from jaxunlearn.results import boards
    from jaxunlearn.results.gathering import gather
    from jaxunlearn.results.sheets import FORMATS

    table, written = args.table or TABLES[0], FORMATS[args.format or "markdown"]
    if table == "rules":
        if args.results:
            raise UserError("--table rules takes no records: it is of the rules that ship")
        return written([boards.rules()])
    records, refused = gather(args.results or [Path("runs")])
    for line in refused:
        print(f"warning: {line}", file=sys.stderr)
    if not records:
        places = ", ".join(map(str, args.results)) or "runs"
        raise UserError(f"there are no records in {places}: name folders of them, or run a benchmark first")
    make = {"results": boards.results, "short": boards.short, "published": boards.verdicts, "readings": boards.readings}
    sheets = [sheet for board in boards.boards(records) if (sheet := make[table](board))]
    if not sheets:
        raise UserError("nothing is published that these records can be compared with")
    return written(sheets)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text'}") from None


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
