"""Tune methods by one procedure: as many trials each, on held-out images.

A tenth of the training images, of each class the last, is not trained on and stands in for the test images, which are
never looked at. The best trial is the one with the smallest average gap to a model that was retrained on the same
images without the class. Trial 0 has the defaults. Results go to stdout and, after each trial, to
OUT/tuning/<bench>/<method>.json; what is there is not tried again. Exit status as of bench.
"""

import argparse
import json
import sys

from jaxunlearn.benchmarks import SWITCHES
from jaxunlearn.commands.arguments import (
    INTERRUPTED,
    add_methods,
    add_output,
    add_processes,
    add_protocol,
    add_seeds,
    add_where,
    place_parts,
    read_protocol,
    seed_parts,
)
from jaxunlearn.commands.parser import Parser
from jaxunlearn.errors import UserError

__all__ = ["INTERRUPTED", "add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Gives the parser the command's arguments."""
    parser.usage = "%(prog)s --bench NAME [--method NAME ...] [FLAG ...]"
    add_methods(parser)
    add_seeds(parser)
    add = parser.add_argument
    add("--trials", type=int, default=20, metavar="N", help="how many of each method (default: %(default)s)")
    add(
        "--range",
        action="append",
        default=[],
        metavar="NAME.KEY=LOW:HIGH",
        help="where to look for a hyperparameter (scrub.temperature=1:8); what --set names is not varied",
    )
    add(
        "--together",
        type=int,
        metavar="K",
        help="so many trials of a method at once, vmapped, if they differ in no more than numbers that are no ints "
        "(default: on a CPU one, else all)",
    )
    add_protocol(parser, {name: text for name, text in SWITCHES.items() if name != "validation"})
    add_where(parser)
    add_processes(parser)
    add_output(parser, "begin anew where OUT has trials of other settings, which are put aside")


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Raises UserError."""
    from jaxunlearn.devices.configuration import request_devices, within_memory
    from jaxunlearn.devices.processes import join, keep_stdout_for_results, leads, watched
    from jaxunlearn.progress import Reporter
    from jaxunlearn.registry import RETRAIN
    from jaxunlearn.runs.request import Request, get_methods, parse_settings, settled
    from jaxunlearn.tuning.ranges import MOST
    from jaxunlearn.tuning.running import tune
    from jaxunlearn.tuning.studies import study_of
    from jaxunlearn.tuning.tables import print_study

    if not 1 <= args.trials <= MOST:
        raise UserError(f"--trials {args.trials}: it must be at least 1 and at most {MOST:,}")
    if args.together is not None and args.together < 1:
        raise UserError(f"--together {args.together}: it must be at least 1")
    protocol, chosen, settings = read_protocol(args, validation=True)
    parts = place_parts(args) | seed_parts(args)
    asked = parse_settings(args.range, "--range", "LOW:HIGH, such as scrub.temperature=1:8")
    methods = [method for method in get_methods(args.method, settings) if method.name != RETRAIN]
    if not methods:
        raise UserError(f"--method {RETRAIN}: it is what others are compared with, name one of these")
    for owner, values in asked.items():
        if owner not in {method.name for method in methods}:
            raise UserError(f"--range {owner}.{next(iter(values))}: '{owner}' is not among the methods of this run")
    if join(args.coordinator, args.num_processes, args.process_id):
        keep_stdout_for_results()
    request_devices(args.devices, args.deterministic)
    with watched(), within_memory():
        request = Request(
            **parts, protocol=settled(protocol, chosen), methods=methods, together=args.together, force=args.force
        )
        studies = [
            study_of(request, one, args.trials, settings.get(one.name, {}).keys(), asked.get(one.name, {}))
            for one in methods
        ]
        found = tune(request, studies, Reporter(args.quiet), args.force, _warn)
    for number, study in enumerate(found if leads() else ()):
        if args.json:
            print(json.dumps(study.content))
        else:
            print(end="\n" if number else "")
            print_study(study, request)
    return 0


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
