"""Make one page of results to look at: tables, plots and curves, from records alone.

The page opens from disk in any browser and needs no network. In folders it takes records of runs, and those of audits
and of speed in folders `audit` and `speed`; what is none is named on stderr, in a line, and left out. Exit status: 0
done; 2 the input is wrong, as where there is no record at all; 1 anything else.
"""

import argparse
import sys
from pathlib import Path

from jaxunlearn.files import default_cache

INTERRUPTED = "interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="RESULTS", help="folders of records, and records (default: runs)")
    add(
        "--out",
        type=Path,
        metavar="FILE.html",
        default=Path("report.html"),
        help="the page; an earlier report is replaced, anything else is not (default: %(default)s)",
    )
    add("--plots", type=Path, metavar="DIR", help="write each plot as PNG and SVG too, for papers")
    add(
        "--data-dir",
        type=Path,
        metavar="PATH",
        help="where images are, to show some (else $JAXUNLEARN_DATA, then the cache; never a download)",
    )
    add("--cache-dir", type=Path, metavar="DIR", default=default_cache(), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Writes the page. Raises UserError."""
    # Here, because these take a second to import and `--help` should not.
    from jaxunlearn.report.writing import write_report

    places = args.results or [Path("runs")]
    for line in write_report(places, args.out, args.data_dir, args.cache_dir, args.plots):
        print(f"warning: {line}", file=sys.stderr)
    print(f"{args.out}")
    return 0
