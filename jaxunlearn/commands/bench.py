"""Run a class-unlearning benchmark: pretrain (or load), unlearn with each method, evaluate, print a table.

Results go to stdout and to OUT/<bench>/<method>/seed<k>.json, progress to stderr. Exit status: 0 done, also when a
method diverged (its row says so); 2 the input is wrong; 1 anything else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxunlearn.benchmarks import AGAINST_RETRAIN, ATTEMPTS, BENCHMARKS, CHOICES, EVALUATIONS, FLAGS, SWITCHES
from jaxunlearn.errors import UserError
from jaxunlearn.files import default_cache

if TYPE_CHECKING:
    from jaxunlearn.runs.preparation import Prepared

INTERRUPTED = "interrupted: the same command goes on from the last checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("--bench", metavar="NAME", help="the benchmark: " + ", ".join(BENCHMARKS))
    add("--list", action="store_true", help="list benchmarks and methods with what they read, and stop")
    add(
        "--method",
        nargs="+",
        metavar="NAME|FILE.py",
        help="methods by name, files with your own, or a group: baselines, submitted, all "
        "(default: the four baselines and the output mask)",
    )
    add(
        "--seeds", default="42", metavar="SEEDS", help="42, 0-7 or 1,5,9; several train together (default: %(default)s)"
    )
    add(
        "--unlearn-seeds",
        type=int,
        default=1,
        metavar="J",
        help="unlearn each original J times, with random numbers of their own (default: %(default)s)",
    )
    add(
        "--against-retrain",
        action=argparse.BooleanOptionalAction,
        help="train the reference that never saw the class too, or take it from the cache, and measure how far each "
        f"method is from it (default: only for {', '.join(AGAINST_RETRAIN)})",
    )
    add(
        "--evaluate",
        choices=EVALUATIONS,
        default=EVALUATIONS[0],
        help="full: also a linear probe, relearning and a support vector attack (default: %(default)s)",
    )
    add(
        "--attempts",
        type=int,
        default=ATTEMPTS,
        metavar="N",
        help="draw a seed that learns nothing in pretraining anew, to N attempts in all (default: %(default)s)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="a hyperparameter (scrub.temperature=2) or a field of the protocol (protocol.pretrain_lr=0.05)",
    )
    protocol = parser.add_argument_group(
        "protocol", "where a value is not the benchmark's own, records go to a folder of their own"
    )
    for name, text in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        if name in CHOICES:
            protocol.add_argument(flag, choices=CHOICES[name], type=type(CHOICES[name][0]), help=text)
        else:
            protocol.add_argument(flag, type=int, metavar="N", help=text)
    for name, text in SWITCHES.items():
        protocol.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    protocol.add_argument(
        "--init-weights",
        type=Path,
        metavar="FILE",
        help="start from a PyTorch state_dict (.npz, .safetensors or, with PyTorch, its own files), no pretraining",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data-dir",
        type=Path,
        metavar="PATH",
        help="where the images are, a folder or a file (else $JAXUNLEARN_DATA, then the cache, then a download)",
    )
    where.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        default=default_cache(),
        help="pretrained models, compiled programs, downloads (default: %(default)s)",
    )
    where.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs"), help="result records (default: %(default)s)"
    )
    where.add_argument(
        "--export-weights",
        type=Path,
        metavar="DIR",
        help="write each unlearned model as a .safetensors state_dict, named like its record",
    )
    where.add_argument(
        "--keep-predictions",
        action="store_true",
        help="write what each model says of each image, log-probabilities in float16, beside its record as .npz",
    )
    where.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many devices, of each process; on a CPU, makes that many host devices",
    )
    where.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits from the same command on a GPU too, which is slower there; a CPU always has them",
    )
    where.add_argument(
        "--save-every",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="seconds between two checkpoints of what is training (default: %(default)g)",
    )
    several = parser.add_argument_group(
        "several processes",
        "one run on several machines: the same command for each; Slurm, Open MPI and TPU pods set these",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is to be found by the others")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    several.add_argument("--process-id", type=int, metavar="K", help="which of them this is, from 0 on")
    output = parser.add_argument_group("output")
    output.add_argument("--force", action="store_true", help="overwrite records")
    output.add_argument("--json", action="store_true", help="print one JSON line a result and nothing else")
    output.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Raises UserError."""
    # Here, because JAX takes a second to import and `--help` should not.
    from jaxunlearn import registry
    from jaxunlearn.devices.configuration import request_devices, within_memory
    from jaxunlearn.devices.processes import join, keep_stdout_for_results, watched
    from jaxunlearn.progress import Reporter
    from jaxunlearn.runs.preparation import prepare
    from jaxunlearn.runs.request import (
        Request,
        get_methods,
        make_protocol,
        parse_seeds,
        parse_settings,
        settled,
        with_retrain,
    )

    if args.list:
        print("benchmarks:", *(f"  {name}" for name in BENCHMARKS), sep="\n")
        methods = [registry.get_method(name) for name in (*registry.names(), registry.RETRAIN)]
        marks = {name: " (reference)" for name in registry.REFERENCES}
        width = max(len(method.name) for method in methods)
        print("methods, and what of the training images they read:")
        print(*(f"  {m.name:{width}}  {m.reads}{marks.get(m.name, '')}" for m in methods), sep="\n")
        print("groups of them: baselines, submitted, all")
        return 0
    if not args.bench:
        raise UserError("name a benchmark with --bench (--list shows all)")
    settings = parse_settings(args.set)
    if flagged := settings.get("protocol", {}).keys() & {*FLAGS, *SWITCHES}:
        key = min(flagged)
        raise UserError(f"--set protocol.{key}: it has a flag of its own, --{key.replace('_', '-')}")
    changes = {name: value for name in (*FLAGS, *SWITCHES) if (value := getattr(args, name)) is not None}
    protocol = make_protocol(args.bench, changes, settings.pop("protocol", {}), args.init_weights)
    seeds = parse_seeds(args.seeds)
    if join(args.coordinator, args.num_processes, args.process_id):
        keep_stdout_for_results()
    request_devices(args.devices, args.deterministic)
    with watched(), within_memory():
        request = Request(
            bench=args.bench,
            protocol=settled(protocol, changes),
            methods=get_methods(args.method, settings, with_retrain(args.bench, args.against_retrain)),
            seeds=seeds,
            out=args.out,
            cache_dir=args.cache_dir,
            data_dir=args.data_dir,
            init_weights=args.init_weights,
            export_weights=args.export_weights,
            devices=args.devices,
            deterministic=args.deterministic,
            save_every=args.save_every,
            attempts=args.attempts,
            unlearn_seeds=args.unlearn_seeds,
            evaluate=args.evaluate,
            keep_predictions=args.keep_predictions,
            force=args.force,
        )
        _print_results(prepare(request, Reporter(args.quiet)), args.json)
    return 0


def _print_results(prepared: "Prepared", as_json: bool) -> None:
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
