"""Measure how fast the steps of a benchmark run, alone or in turn with eager PyTorch.

For pretraining (images/s) and each baseline's unlearning step (steps/s): the median of several bursts on synthetic
images, after warm-up. With --against torch, and with several seeds, which one seed alone is then set beside, the two
sides are processes of their own that take turns, A B A B; the ratio is the median over the pairs. Exit status as of
bench.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from typing import Any

from jaxunlearn.benchmarks import BENCHMARKS, CHOICES, MOST_SEEDS, get_benchmark
from jaxunlearn.commands.parser import INSTALL_TORCH
from jaxunlearn.errors import UserError

PAIRS = 5
INTERRUPTED = "interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("--bench", metavar="NAME", required=True, help="the benchmark: " + ", ".join(BENCHMARKS))
    add("--against", choices=["torch"], help="what to take turns with: eager PyTorch on the CPU")
    add("--seeds", type=int, default=1, metavar="S", help="so many seeds, vmapped (default: %(default)s)")
    add("--devices", type=int, metavar="N", help="how many devices; on a CPU, makes that many host devices")
    add("--precision", choices=CHOICES["precision"], default="fp32", help="of the computation (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON line and nothing else")


class Side:
    """One side of the comparison, in a process of its own. Made, it is ready and idle."""

    def __init__(self, serve: Callable[..., None], *arguments: Any):
        from jaxunlearn.speed import side

        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        context.Process(target=side, args=(there, serve, *arguments), daemon=True).start()
        there.close()
        self._receive()

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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record of a comparison. Raises UserError."""
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {args.seeds}: at least one, at most {MOST_SEEDS:,}")
    protocol = dataclasses.replace(get_benchmark(args.bench), precision=args.precision)
    from jaxunlearn import speed
    from jaxunlearn.data.datasets import DATASETS

    classes = DATASETS[protocol.dataset].num_classes
    other = "torch" if args.against else "one seed" if args.seeds > 1 else None
    serves: list[tuple[Any, ...]] = [(speed.serve, protocol, classes, args.seeds, args.devices)]
    if args.against:
        try:
            from jaxunlearn.torch_reference import speed as torch_speed
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UserError(f"--against torch needs PyTorch: {INSTALL_TORCH}") from None
        serves.append((torch_speed.serve, protocol, classes))
    elif other:
        serves.append((speed.serve, protocol, classes, 1, args.devices))
    sides = [Side(*serve) for serve in serves]
    rows = {}
    for name in speed.QUANTITIES:
        pairs = [[side.ask(name) for side in sides] for _ in range(PAIRS)]
        # A step of ours is one of every seed.
        unit = protocol.batch_size if name == speed.PRETRAIN else 1
        rates = [[unit * args.seeds / mine, *(unit / theirs for theirs in rest)] for mine, *rest in pairs]
        row: dict[str, Any] = {"unit": "images/s" if name == speed.PRETRAIN else "steps/s"}
        row["ours"], row["ours_bursts"] = statistics.median(r[0] for r in rates), [r[0] for r in rates]
        if other:
            row[other], row[f"{other}_bursts"] = statistics.median(r[1] for r in rates), [r[1] for r in rates]
            row["ratio"] = statistics.median(r[0] / r[1] for r in rates)
        rows[name] = row
        print(f"{name}: {row['ours']:.4g} {row['unit']}", file=sys.stderr)
    ours, *others = (side.ask(None) for side in sides)
    flops = 6 * ours["multiply_adds"] * rows[speed.PRETRAIN]["ours"]
    report = {"bench": args.bench, "against": other, "seeds": args.seeds, "precision": args.precision, "pairs": PAIRS}
    utilisation = flops / (ours["matmul_gflops"] * 1e9)
    return report | {"quantities": rows, "model_flop_utilisation": utilisation} | ours | {"other": others or None}


def print_record(record: dict[str, Any]) -> None:
    """The record as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    other = record["against"]
    ours = "ours" if record["seeds"] == 1 else f"ours, {record['seeds']} seeds"
    for heading in ("", "unit", ours, *([other, "ratio"] if other else []), "compile s"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for name, row in record["quantities"].items():
        cells = [f"{row['ours']:.4g}", *([f"{row[other]:.4g}", f"{row['ratio']:.2f}"] if other else [])]
        table.add_row(name, row["unit"], *cells, f"{record['compile_s'][name]:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    devices = f"{record['environment']['device_count']} {record['environment']['device_kind']} device(s)"
    facts = (
        f"{record['bench']}, {record['precision']}, {devices}",
        f"model FLOP utilisation {record['model_flop_utilisation']:.2f} of {record['matmul_gflops']:.0f} GFLOP/s",
        f"peak memory {record['peak_memory_gib']:.1f} GiB",
    )
    console.print("; ".join(facts), highlight=False, soft_wrap=True)


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises UserError."""
    record = measure(args)
    print(json.dumps(record)) if args.json else print_record(record)
    return 0
