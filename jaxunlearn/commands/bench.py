"""Run a benchmark: pretrain or load a model, unlearn with each method, evaluate.

Results go to stdout and to OUT/<bench>/<method>/seed<k>.json, progress to stderr. Exit status: 0 done, also when a
method diverged (its row says so); 2 the input is wrong; 1 anything else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxunlearn.benchmarks import BENCHMARKS, EVALUATIONS, SWITCHES
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

if TYPE_CHECKING:
    from jaxunlearn.runs.preparation import Prepared

SHORTER = "; for a shorter try: --pretrain-epochs 1 --unlearn-epochs 1 --train-limit 5000"
__all__ = ["INTERRUPTED", "add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Gives the parser the command's arguments."""
    parser.usage = "%(prog)s --bench NAME [--method NAME ...] [FLAG ...]"
    add_methods(parser)
    add_seeds(parser)
    add = parser.add_argument
    add("--list", action="store_true", help="list benchmarks, and methods with what they read")
    add(
        "--against-retrain",
        action=argparse.BooleanOptionalAction,
        help="retrain too, and compare each method with it (default: for digits)",
    )
    add(
        "--evaluate",
        choices=EVALUATIONS,
        default=EVALUATIONS[0],
        help="full: also a probe, relearning and a support vector attack",
    )
    add(
        "--eval-every",
        type=int,
        metavar="K",
        help="evaluate every K epochs of unlearning too; the last model is scored",
    )
    add_protocol(parser, SWITCHES).add_argument(
        "--init-weights",
        type=Path,
        metavar="FILE",
        help="a PyTorch state_dict (.npz, .safetensors, .pt), not pretraining",
    )
    where = add_where(parser)
    where.add_argument(
        "--export-weights",
        type=Path,
        metavar="DIR",
        help="write each unlearned model as a .safetensors state_dict",
    )
    where.add_argument(
        "--keep-predictions",
        action="store_true",
        help="write each model's log-probabilities beside its record, as .npz",
    )
    where.add_argument("--tensorboard", type=Path, metavar="DIR", help="write event files (needs tensorboardX)")
    add_processes(parser)
    add_output(parser, "overwrite records").add_argument(
        "--report", type=Path, metavar="FILE.html", help="make a page of the results (see `report --help`)"
    )


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Raises UserError."""
    # Here, because JAX takes a second to import and `--help` should not.
    from jaxunlearn import registry
    from jaxunlearn.devices.configuration import request_devices, within_memory
    from jaxunlearn.devices.processes import join, keep_stdout_for_results, leads, watched
    from jaxunlearn.progress import Reporter
    from jaxunlearn.runs.preparation import prepare
    from jaxunlearn.runs.request import Request, get_methods, settled, with_retrain

    if args.list:
        print("benchmarks:", *(f"  {name}" for name in BENCHMARKS), sep="\n")
        methods = [registry.get_method(name) for name in (*registry.names(), registry.RETRAIN)]
        marks = {name: " (reference)" for name in registry.REFERENCES}
        width = max(len(method.name) for method in methods)
        print("methods, and what of the training images they read:")
        print(*(f"  {m.name:{width}}  {m.reads}{marks.get(m.name, '')}" for m in methods), sep="\n")
        print("groups of them: baselines, submitted, all")
        return 0
    protocol, chosen, settings = read_protocol(args, args.init_weights)
    if args.report:
        from jaxunlearn.report.writing import check_report

        check_report(args.report)
    parts = place_parts(args) | seed_parts(args)
    if join(args.coordinator, args.num_processes, args.process_id):
        keep_stdout_for_results()
    request_devices(args.devices, args.deterministic)
    with watched(), within_memory():
        request = Request(
            **parts,
            protocol=settled(protocol, chosen),
            methods=get_methods(args.method, settings, with_retrain(args.bench, args.against_retrain)),
            init_weights=args.init_weights,
            export_weights=args.export_weights,
            evaluate=args.evaluate,
            eval_every=args.eval_every,
            keep_predictions=args.keep_predictions,
            tensorboard=args.tensorboard,
            force=args.force,
        )
        prepared = prepare(request, Reporter(args.quiet, SHORTER))
        found = _print_results(prepared, args.json)
        if args.report and leads():
            from jaxunlearn.report.writing import write_run

            for line in write_run(request, found, args.report):
                print(f"warning: {line}", file=sys.stderr)
    return 0


def _print_results(prepared: "Prepared", as_json: bool) -> list[dict[str, Any]]:
    """Runs what is prepared and prints it; its records."""
    from jaxunlearn.devices.processes import leads
    from jaxunlearn.results.tables import print_results
    from jaxunlearn.runs.running import results

    found = []
    for record, kept in results(prepared):
        found.append(record)
        if kept:
            print(f"warning: {kept}", file=sys.stderr)
        if as_json and leads():
            print(json.dumps(record), flush=True)
    if leads() and not as_json:
        print_results(found, **prepared.table_facts)
    return found
