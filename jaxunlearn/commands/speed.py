"""Measure how fast the steps of a benchmark run, alone or in turn with PyTorch.

For pretraining (images/s) and each baseline's unlearning step (steps/s): the median of several bursts on synthetic
images, after warm-up, and the seconds that compiling them took, without ("compile s") and with what an earlier process
had kept of it ("warm s"). With --against, and with several seeds, which one seed alone is then set beside, the two
sides are processes of their own that take turns, A B A B; the ratio is the median over the pairs. Exit status as of
bench.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jaxunlearn.benchmarks import BENCHMARKS, CHOICES, MOST_SEEDS, Protocol, get_benchmark
from jaxunlearn.commands.parser import INSTALL_TORCH
from jaxunlearn.errors import UserError

PAIRS = 5
INTERRUPTED = "interrupted"
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("--bench", metavar="NAME", required=True, help="the benchmark: " + ", ".join(BENCHMARKS))
    add(
        "--against",
        choices=["torch", "torch-best"],
        help="what to take turns with: PyTorch on the same device, in the fastest form at the same or at any precision",
    )
    add("--seeds", type=int, default=1, metavar="S", help="so many seeds, vmapped (default: %(default)s)")
    add("--devices", type=int, metavar="N", help="how many devices; on a CPU, makes that many host devices")
    add("--precision", choices=CHOICES["precision"], help="of the computation (default: fp32, on a GPU tf32)")
    add("--json", action="store_true", help="print one JSON line and nothing else")


class Side:
    """One side of the comparison, in a process of its own. Made, it is idle and has said something `about` itself."""

    def __init__(self, serve: Callable[..., None], *arguments: Any):
        from jaxunlearn.speed import side

        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        context.Process(target=side, args=(there, serve, *arguments), daemon=True).start()
        there.close()
        self.about = self._receive()

    def ask(self, name: str | None) -> Any:
        """Seconds of a step of the quantity `name`, or, of None, the closing report."""
        self._connection.send(name)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError("a side of the comparison ended early: see above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer


@contextmanager
def sharing_memory() -> Iterator[None]:
    """Has processes that are started inside take a device's memory as they need it, unless the user decided that.

    JAX takes three quarters of it at the first use, so a second process on the same device would have too little.
    """
    if {PREALLOCATE, "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        yield
        return
    os.environ[PREALLOCATE] = "false"
    try:
        yield
    finally:
        del os.environ[PREALLOCATE]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record of a comparison. Raises UserError."""
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {args.seeds}: at least one, at most {MOST_SEEDS:,}")
    protocol = get_benchmark(args.bench)
    if args.against:
        try:
            from jaxunlearn.torch_reference import speed as torch_speed
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UserError(f"--against {args.against} needs PyTorch: {INSTALL_TORCH}") from None
    # JAX is used in the sides alone: here it would take memory of the device.
    from jaxunlearn import speed
    from jaxunlearn.data.datasets import DATASETS

    classes = DATASETS[protocol.dataset].num_classes
    other = args.against or ("one seed" if args.seeds > 1 else None)
    with ExitStack() as stack:
        programs = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        stack.enter_context(sharing_memory() if other else nullcontext())
        sides = [Side(speed.serve, protocol, classes, args.precision, args.seeds, args.devices, programs / "ours")]
        # The first side knows what it runs on; the other is told.
        about = sides[0].about
        protocol = dataclasses.replace(protocol, precision=about["precision"])
        if args.against:
            told = about["steps"], about["platform"], args.against == "torch-best"
            sides.append(Side(torch_speed.serve, protocol, classes, *told))
        elif other:
            sides.append(Side(speed.serve, protocol, classes, about["precision"], 1, args.devices, programs / "one"))
        rows = {name: _take_turns(name, sides, protocol, args.seeds, other) for name in speed.QUANTITIES}
        ours, *others = (side.ask(None) for side in sides)
    flops = 6 * ours["multiply_adds"] * rows[speed.PRETRAIN]["ours"]
    report = {"bench": args.bench, "against": other, "seeds": args.seeds, "precision": protocol.precision}
    report |= {"pairs": PAIRS, "quantities": rows, "model_flop_utilisation": flops / (ours["matmul_gflops"] * 1e9)}
    return report | ours | {"other": others or None}


def _take_turns(name: str, sides: list[Side], protocol: Protocol, seeds: int, other: str | None) -> dict[str, Any]:
    """The row of a quantity: rates of `PAIRS` bursts of each side, their medians and that of the pairs' ratios."""
    pairs = [[side.ask(name) for side in sides] for _ in range(PAIRS)]
    # A step of ours is one of every seed.
    unit = protocol.batch_size if name == "pretrain" else 1
    rates = [[unit * seeds / mine, *(unit / theirs for theirs in rest)] for mine, *rest in pairs]
    row: dict[str, Any] = {"unit": "images/s" if name == "pretrain" else "steps/s"}
    row["ours"], row["ours_bursts"] = statistics.median(r[0] for r in rates), [r[0] for r in rates]
    if other:
        row[other], row[f"{other}_bursts"] = statistics.median(r[1] for r in rates), [r[1] for r in rates]
        row["ratio"] = statistics.median(r[0] / r[1] for r in rates)
    print(f"{name}: {row['ours']:.4g} {row['unit']}", file=sys.stderr)
    return row


def print_record(record: dict[str, Any]) -> None:
    """The record as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    other = record["against"]
    settings = record["other"][0].get("settings", {}) if other else {}
    ours = "ours" if record["seeds"] == 1 else f"ours, {record['seeds']} seeds in all"
    theirs = [f"{other} alone" if other == "one seed" else other, "ratio"] if other else []
    for heading in ("", "unit", ours, *theirs, "compile s", "warm s", *(["PyTorch runs"] if settings else [])):
        table.add_column(heading, justify="left" if heading in ("", "unit", "PyTorch runs") else "right")
    for name, row in record["quantities"].items():
        cells = [f"{row['ours']:.4g}", *([f"{row[other]:.4g}", f"{row['ratio']:.2f}"] if other else [])]
        cells += [f"{record[key][name]:.1f}" for key in ("compile_s", "warm_compile_s")]
        table.add_row(name, row["unit"], *cells, *([", ".join(settings[name].values())] if settings else []))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    devices = f"{record['environment']['device_count']} {record['environment']['device_kind']} device(s)"
    facts = (
        f"{record['bench']}, {record['precision']}, {devices}",
        f"model FLOP utilisation {record['model_flop_utilisation']:.2f} of {record['matmul_gflops']:.0f} GFLOP/s",
        f"copies at {record['copy_gb_s']:.0f} GB/s",
        f"peak memory {record['peak_memory_gib']:.1f} GiB",
    )
    console.print("; ".join(facts), highlight=False, soft_wrap=True)
    for what, why in (record["other"][0].get("left_out", {}) if other else {}).items():
        console.print(f"left out, {what}: {why}", markup=False, highlight=False, soft_wrap=True)


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises UserError."""
    record = measure(args)
    print(json.dumps(record)) if args.json else print_record(record)
    return 0
