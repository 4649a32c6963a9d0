"""Arguments that the commands with whole runs share, and what is made of them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxunlearn.benchmarks import ATTEMPTS, CHOICES, FLAGS, SWITCHES
from jaxunlearn.commands.parser import HelpAll, Parser
from jaxunlearn.errors import UserError
from jaxunlearn.files import default_cache

if TYPE_CHECKING:
    from jaxunlearn.benchmarks import Protocol
    from jaxunlearn.runs.request import Settings

# Of the protocol, what the short help only names.
RARE = (
    "forget_class",
    "epoch_length",
    "crop_padding",
    "mobilenet_stride",
    "resnet_shortcut",
    "drop_last",
    "mia_augment",
)
INTERRUPTED = "interrupted: the same command goes on from the last checkpoint"


def add_methods(parser: Parser) -> None:
    """What is run."""
    add = parser.add_argument
    add("--help-all", action=HelpAll, nargs=0, help="help on the rarer flags too")
    add("--bench", metavar="NAME", help="the benchmark, such as resnet20-digits-class0 (bench --list shows all)")
    add(
        "--method",
        nargs="+",
        metavar="NAME",
        help="methods, files of your own (FILE.py), or baselines, submitted, all "
        "(default: the baselines and the output mask)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="a hyperparameter (scrub.temperature=2) or protocol.FIELD=VALUE",
    )


def add_seeds(parser: Parser) -> None:
    """With which seeds."""
    add = parser.add_argument
    add(
        "--seeds", default="42", metavar="SEEDS", help="42, 0-7 or 1,5,9; several train together (default: %(default)s)"
    )
    add(
        "--unlearn-seeds",
        type=int,
        default=1,
        metavar="J",
        help="unlearn each original so many times (default: %(default)s)",
    )
    attempts = add(
        "--attempts",
        type=int,
        default=ATTEMPTS,
        metavar="N",
        help="draw a seed that learns nothing in pretraining anew, to N attempts in all (default: %(default)s)",
    )
    parser.rarely(attempts)


def add_protocol(parser: Parser, switches: Mapping[str, str]) -> "argparse._ArgumentGroup":
    """The flags of the protocol's fields; of the `switches`, help by name, those."""
    protocol = parser.add_argument_group(
        "protocol, each value the benchmark's own; of others, records go to another folder"
    )
    for name, text in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        if name in CHOICES:
            added = protocol.add_argument(flag, choices=CHOICES[name], type=type(CHOICES[name][0]), help=text)
        else:
            added = protocol.add_argument(flag, type=int, metavar="N", help=text)
        if name in RARE:
            parser.rarely(added)
    for name, text in switches.items():
        flag = name.replace("_", "-")
        added = protocol.add_argument(f"--{flag}", action="store_true", default=None, help=text)
        # For a benchmark that has it on.
        protocol.add_argument(f"--no-{flag}", dest=name, action="store_false", default=None, help=argparse.SUPPRESS)
        if name in RARE:
            parser.rarely(added)
    return protocol


def add_where(parser: Parser) -> "argparse._ArgumentGroup":
    """Where things lie and run."""
    where = parser.add_argument_group("where")
    where.add_argument(
        "--data-dir",
        type=Path,
        metavar="PATH",
        help="the images (else $JAXUNLEARN_DATA, the cache, then a download)",
    )
    where.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        default=default_cache(),
        help="models, programs, data (default: %(default)s)",
    )
    where.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs"), help="result records (default: %(default)s)"
    )
    where.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many, of each process; a CPU is made that many (default: all)",
    )
    deterministic = where.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits from the same command on a GPU too, which is slower there; a CPU always has them",
    )
    save_every = where.add_argument(
        "--save-every",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="seconds between two checkpoints of what is training (default: %(default)g)",
    )
    parser.rarely(deterministic, save_every)
    return where


def add_processes(parser: Parser) -> None:
    """How several processes find each other."""
    several = parser.add_argument_group("several processes")
    parser.rarely(
        several.add_argument(
            "--coordinator",
            metavar="HOST:PORT",
            help="where process 0 is to be found by the others, which have the same command; Slurm, Open MPI and TPU "
            "pods set these three",
        ),
        several.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are"),
        several.add_argument("--process-id", type=int, metavar="K", help="which of them this is, from 0 on"),
    )


def add_output(parser: Parser, force: str) -> "argparse._ArgumentGroup":
    """What is printed, and, by `force`, replaced."""
    output = parser.add_argument_group("output")
    output.add_argument("--force", action="store_true", help=force)
    output.add_argument("--json", action="store_true", help="print one JSON line a result and nothing else")
    output.add_argument("--quiet", action="store_true", help="no progress")
    return output


def read_protocol(
    args: argparse.Namespace, init_weights: Path | None = None, **fixed: Any
) -> tuple["Protocol", set[str], "Settings"]:
    """The protocol, which of its fields have a flag or are `fixed`, and the settings of methods. Raises UserError."""
    from jaxunlearn.runs.request import make_protocol, parse_settings

    if not args.bench:
        raise UserError("name a benchmark with --bench (bench --list shows all)")
    settings = parse_settings(args.set)
    if flagged := settings.get("protocol", {}).keys() & {*FLAGS, *SWITCHES}:
        key = min(flagged)
        raise UserError(f"--set protocol.{key}: it has a flag of its own, --{key.replace('_', '-')}")
    changes = {name: value for name in (*FLAGS, *SWITCHES) if (value := getattr(args, name, None)) is not None} | fixed
    protocol = make_protocol(args.bench, changes, settings.pop("protocol", {}), init_weights)
    return protocol, set(changes), settings


def place_parts(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of which benchmark is run where, by the fields of a `Request`."""
    names = "bench", "out", "cache_dir", "data_dir", "devices", "deterministic", "save_every"
    return {name: getattr(args, name) for name in names}


def seed_parts(args: argparse.Namespace) -> dict[str, Any]:
    """What they say of the seeds. Raises UserError."""
    from jaxunlearn.runs.request import parse_seeds

    return {"seeds": parse_seeds(args.seeds), "unlearn_seeds": args.unlearn_seeds, "attempts": args.attempts}
