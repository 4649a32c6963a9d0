#!/usr/bin/env python3
"""Run a class-unlearning benchmark: pretrain (or load), unlearn with each method, evaluate, print a table.

Results go to stdout and to OUT/<bench>/<method>/seed<k>.json, progress to stderr. Exit status: 0 done, also when a
method diverged (its row says so); 2 the input is wrong; 1 anything else.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxunlearn.benchmarks import BENCHMARKS, CHOICES, MOST_SEEDS, Protocol, get_benchmark
from jaxunlearn.commands import Parser, exit_status
from jaxunlearn.errors import UserError
from jaxunlearn.files import default_cache
from jaxunlearn.memory import restart_with_memory_kept

# The protocol's fields that have a flag of their own, and its help. `--set protocol.FIELD=VALUE` sets the others.
FLAGS = {
    "pretrain_epochs": "epochs of pretraining",
    "unlearn_epochs": "epochs of unlearning",
    "batch_size": "images a batch, over all devices",
    "train_limit": "use this many training images, equally many of each class",
    "forget_class": "index of the class to forget",
    "epoch_length": "steps of an unlearning epoch: of the smaller set, or of the retain set",
    "crop_padding": "what surrounds an image before the random crop",
    "mobilenet_stride": "stride of MobileNetV2's 24-channel stage",
    "resnet_shortcut": "ResNet-20's shortcut: 1x1 convolution (B) or none (A)",
    "precision": "of the computation; parameters and statistics stay fp32",
}

# Those that are not for `--set`: they have a flag, or they are what the benchmark is.
NOT_SET = {*FLAGS, "drop_last", "mia_augment", "init_weights", "model", "dataset"}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bench", metavar="NAME", help="the benchmark: " + ", ".join(BENCHMARKS))
    add("--list", action="store_true", help="list benchmarks and methods, and stop")
    add(
        "--method",
        nargs="+",
        metavar="NAME|FILE.py",
        help="methods by name, or files with your own (default: the four baselines)",
    )
    add(
        "--seeds", default="42", metavar="SEEDS", help="42, 0-7 or 1,5,9; several train together (default: %(default)s)"
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
    protocol.add_argument("--drop-last", action="store_true", default=None, help="leave out partial last batches")
    protocol.add_argument(
        "--mia-augment", action="store_true", default=None, help="the attack sees augmented forget-train images"
    )
    protocol.add_argument(
        "--init-weights",
        type=Path,
        metavar="FILE",
        help="start from a PyTorch state_dict (.npz, .safetensors; .pt, .pth, .th with PyTorch), no pretraining",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the images are (else $JAXUNLEARN_DATA, then the cache, then a download)",
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
        "--devices",
        type=int,
        metavar="N",
        help="how many devices, of each process; on a CPU, makes that many host devices",
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
    return parser


def parse_seeds(text: str) -> list[int]:
    """The seeds of "42", "0-7" or "1,5,9", in order. Raises UserError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not 0 < len(span) <= MOST_SEEDS:
                raise ValueError
            seeds += span
    except (ValueError, OverflowError):
        seeds = []
    if not 0 < len(seeds) <= MOST_SEEDS or len(set(seeds)) != len(seeds) or max(seeds) >= 2**32:
        raise UserError(
            f"--seeds {text}: write 42, 0-7 or 1,5,9, each seed once, from 0 to {2**32 - 1}, {MOST_SEEDS:,} at most"
        )
    return seeds


def parse_settings(pairs: list[str]) -> dict[str, dict[str, str]]:
    """`["scrub.temperature=2"]` as `{"scrub": {"temperature": "2"}}`. Raises UserError for what is no such pair."""
    settings: dict[str, dict[str, str]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        owner, _, key = name.rpartition(".")
        if not (owner and key and value):
            raise UserError(f"--set {pair}: write NAME.KEY=VALUE, such as scrub.temperature=2")
        settings.setdefault(owner, {})[key] = value
    return settings


def make_protocol(args: argparse.Namespace, settings: dict[str, str]) -> Protocol:
    """The benchmark's protocol with what the user changed."""
    from jaxunlearn.methods import parse_value

    own = get_benchmark(args.bench)
    fields = dataclasses.asdict(own)
    changes = {name: value for name in fields if (value := getattr(args, name, None)) is not None}
    for key, text in settings.items():
        if key not in fields or key in NOT_SET:
            known = ", ".join(name for name in fields if name not in NOT_SET)
            raise UserError(f"--set protocol.{key}: no such field without a flag of its own (there are {known})")
        changes[key] = parse_value(f"protocol.{key}", text, fields[key])
    if args.init_weights:
        if not os.path.isfile(args.init_weights):  # a device or a pipe may never end
            raise UserError(f"--init-weights {args.init_weights}: no such file")
        try:
            with args.init_weights.open("rb") as file:
                changes["init_weights"] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"--init-weights {args.init_weights}: {error.strerror}") from None
    return dataclasses.replace(own, **changes)


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Raises UserError."""
    from jaxunlearn import methods
    from jaxunlearn.processes import join, keep_stdout_for_results, watched
    from jaxunlearn.sharding import request_devices

    if args.list:
        print("benchmarks:", *(f"  {name}" for name in BENCHMARKS), sep="\n")
        print("methods:", *(f"  {name}" for name in methods.names()), f"  {methods.RETRAIN} (reference)", sep="\n")
        return 0
    if not args.bench:
        raise UserError("name a benchmark with --bench (--list shows all)")
    if not 0 <= args.save_every < float("inf"):
        raise UserError(f"--save-every {args.save_every}: it must be at least 0")
    settings = parse_settings(args.set)
    protocol = make_protocol(args, settings.pop("protocol", {}))
    seeds = parse_seeds(args.seeds)
    if join(args.coordinator, args.num_processes, args.process_id):
        keep_stdout_for_results()
    request_devices(args.devices)
    with watched():
        run_benchmark(args, protocol, seeds, settings)
    return 0


def run_benchmark(
    args: argparse.Namespace, protocol: Protocol, seeds: list[int], settings: dict[str, dict[str, str]]
) -> None:
    """Runs and prints the benchmark. Raises UserError."""
    from jaxunlearn import methods

    chosen = []
    for name in args.method or methods.BASELINES:
        title = Path(name).stem if name.endswith(".py") else name
        chosen.append(methods.get_method(name, settings.pop(title, {})))
    if settings:
        owner = next(iter(settings))
        raise UserError(f"--set {owner}.{next(iter(settings[owner]))}: '{owner}' is not among the methods of this run")
    if len({method.name for method in chosen}) != len(chosen):
        raise UserError("--method: each method once, and no two files of the same name")

    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from jaxunlearn.processes import leads
    from jaxunlearn.progress import Reporter
    from jaxunlearn.runs import Request, Run
    from jaxunlearn.tables import print_results

    request = Request(
        bench=args.bench,
        protocol=protocol,
        methods=chosen,
        seeds=seeds,
        out=args.out,
        cache_dir=args.cache_dir,
        data_dir=args.data_dir,
        init_weights=args.init_weights,
        export_weights=args.export_weights,
        devices=args.devices,
        save_every=args.save_every,
        force=args.force,
    )
    prepared = Run(request, Reporter(args.quiet))
    # Only now: what is wrong with the input has been said, and until then nothing may be left behind.
    jax.config.update("jax_compilation_cache_dir", str(args.cache_dir.absolute() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()
    results = []
    for record, kept in prepared.results():
        results.append(record)
        if kept:
            print(f"warning: {kept}", file=sys.stderr)
        if args.json and leads():
            print(json.dumps(record), flush=True)
    if leads() and not args.json:
        members, non_members = prepared.evaluator.counts
        defaults = {method.name: method.defaults for method in chosen}
        print_results(results, defaults=defaults, members=members, non_members=non_members)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command line."""
    return exit_status(run, make_parser(), arguments, "interrupted: the same command goes on from the last checkpoint")


if __name__ == "__main__":
    restart_with_memory_kept()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
