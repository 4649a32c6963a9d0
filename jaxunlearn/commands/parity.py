"""Compare the package with the same harness in PyTorch, quantity by quantity.

Each baseline is compared in both forms, the pure rule and the class of `jaxunlearn.torch_style`. Differences are
relative to the largest value of the layer. Those of metrics are plain; those of parameters after one step are in
updates of Adam, beyond what the difference of the gradients makes of them.

Takes the benchmark's images where it finds them, else scikit-learn's digits; downloads nothing. Exit status: 0 every
difference is within what rounding explains; 1 one is not; 2 the input is wrong.
"""

import argparse
import json
import sys

from jaxunlearn.benchmarks import BENCHMARKS, get_benchmark
from jaxunlearn.commands.parser import INSTALL_TORCH
from jaxunlearn.errors import UserError
from jaxunlearn.files import default_cache

INTERRUPTED = "interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    parser.add_argument("--bench", required=True, metavar="NAME", help="the benchmark: " + ", ".join(BENCHMARKS))
    parser.add_argument("--method", metavar="NAME", help="one baseline (default: the four)")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="K", help="steps of the trajectory in float64 (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")


def run(args: argparse.Namespace) -> int:
    """Compares, prints, and returns the exit status. Raises UserError."""
    from jaxunlearn.data.datasets import DATASETS, find, load
    from jaxunlearn.devices.configuration import computing
    from jaxunlearn.registry import BASELINES, get_method

    protocol = get_benchmark(args.bench)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: it must be at least 1")
    if args.method and get_method(args.method).name not in BASELINES:
        raise UserError(f"--method {args.method}: PyTorch's side has {', '.join(BASELINES)}")
    try:
        from jaxunlearn.torch_reference import parity
        from jaxunlearn.torch_reference.cases import make_case
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UserError(f"this needs PyTorch: {INSTALL_TORCH}") from None
    cache = default_cache()
    dataset = find(protocol.dataset, None, cache) or load("digits", None, cache)
    with computing("fp32"):
        case = make_case(protocol, DATASETS[protocol.dataset].num_classes, dataset, args.steps)
        rows = parity.compare_models(case)
        for name in [args.method] if args.method else BASELINES:
            print(f"comparing {name} ...", file=sys.stderr)
            rows += parity.compare(case, name)
    ok, open_rows = all(row.verdict != "OUT" for row in rows), sum(row.verdict == "open" for row in rows)
    about = {"bench": args.bench, "images": dataset.name, "steps": args.steps, "ok": ok, "open": open_rows}
    if args.json:
        print(json.dumps(about | {"rows": [row.as_json() for row in rows]}))
    else:
        parity.print_rows(rows)
        verdict = "every difference is what rounding explains" if ok else "OUT is more than rounding explains"
        verdict += f"; {open_rows} rows are open" if open_rows else ""
        print(f"{args.bench} against PyTorch, on images of {dataset.name}: {verdict}")
    return 0 if ok else 1
