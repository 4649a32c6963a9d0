"""Attack many models image by image: is the forgotten class's data still in them?

Trains N originals and N retrained models once, unlearns each original with each method, and tells the unlearned models
from the retrained ones. What is there already under OUT, with --keep-predictions of bench, is taken as it is. Results
go to stdout and to OUT/audit/<bench>/<method>-N<k>.json, progress to stderr. Exit status as of bench.
"""

import argparse
import json
import sys
from pathlib import Path

from jaxunlearn.benchmarks import SWITCHES
from jaxunlearn.commands.arguments import (
    INTERRUPTED,
    add_methods,
    add_output,
    add_protocol,
    add_where,
    place_parts,
    read_protocol,
)
from jaxunlearn.commands.parser import Parser
from jaxunlearn.errors import UserError
from jaxunlearn.files import AGAIN, writing

__all__ = ["INTERRUPTED", "add_arguments", "run"]
MOST = 4096  # models


def add_arguments(parser: Parser) -> None:
    """Gives the parser the command's arguments."""
    parser.usage = "%(prog)s --bench NAME [--method NAME ...] [FLAG ...]"
    add_methods(parser)
    add = parser.add_argument
    add(
        "--models",
        type=int,
        default=32,
        metavar="N",
        help="of each kind, seeds 0 to N - 1; 4 is a trial run, 64 a result (default: %(default)s)",
    )
    add("--together", type=int, default=8, metavar="G", help="seeds that train together (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw the curves as .png or .svg (needs matplotlib)")
    add_protocol(parser, SWITCHES)
    add_where(parser)
    add_output(parser, "overwrite models' records of other settings and better ones")


def run(args: argparse.Namespace) -> int:
    """Audits and prints. Raises UserError."""
    # Here, because JAX takes a second to import and `--help` should not.
    from jaxunlearn.audit.auditing import FEWEST, audits
    from jaxunlearn.audit.collecting import collect
    from jaxunlearn.audit.keeping import audit_path, write_audit
    from jaxunlearn.audit.showing import print_audit
    from jaxunlearn.devices.configuration import request_devices, within_memory
    from jaxunlearn.progress import Reporter
    from jaxunlearn.registry import RETRAIN
    from jaxunlearn.report.plots_audit import check_plot, plot_curves
    from jaxunlearn.runs.request import Request, get_methods, settled

    if not FEWEST <= args.models <= MOST:
        raise UserError(f"--models {args.models}: it must be from {FEWEST} to {MOST:,}")
    if args.together < 1:
        raise UserError(f"--together {args.together}: it must be at least 1")
    if args.plot:
        check_plot(args.plot)
    protocol, chosen, settings = read_protocol(args)
    methods = get_methods(args.method, settings, against_retrain=True)
    if [method.name for method in methods] == [RETRAIN]:
        raise UserError(f"--method {RETRAIN}: name a method that is to be told from it")
    request_devices(args.devices, args.deterministic)
    request = Request(
        **place_parts(args),
        protocol=settled(protocol, chosen),
        methods=methods,
        seeds=list(range(args.models)),
        force=args.force,
    )
    with within_memory():
        for warning in collect(request, args.together, Reporter(args.quiet)):
            print(f"warning: {warning}", file=sys.stderr)
    found = []
    for method, record in audits(request):
        found.append(record)
        path = audit_path(request, method)
        with writing(path, AGAIN):
            write_audit(path, record)
        if args.json:
            print(json.dumps(record), flush=True)
    if not args.json:
        print_audit(found)
    if args.plot:
        with writing(args.plot, AGAIN):
            plot_curves(found, args.plot)
    return 0
