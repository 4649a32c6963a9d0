"""The package against PyTorch, quantity by quantity, each with a tolerance and a verdict.

A single step is compared in fp32, and the package's in bf16 with PyTorch's in fp32. A trajectory is compared in
float64: Adam makes a whole step of a gradient that is nothing but rounding, so after some steps in fp32 two correct
programs are far apart.

How far apart may they be? A layer computed with rounding errors is the exact layer of weights that are off by about
sqrt(n) u, where n is the length of its sums and u the unit roundoff (Higham & Mary 2019, "A new approach to
probabilistic rounding error analysis"). So PyTorch runs again from such weights: what that changes has in it the depth
and the condition of the network, the kinks of ReLU and what Adam makes of small gradients. A tolerance is
`SIDES_AND_PASSES` times the change. It comes from PyTorch alone, never from the difference that it judges.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxunlearn.torch_reference.cases import Case
from jaxunlearn.torch_reference.sides import (
    Arrays,
    Trace,
    package_logits,
    package_sides,
    package_trace,
    pytorch_logits,
    pytorch_trace,
    rounding,
)

SIDES_AND_PASSES = 4  # both sides round, forward and backward
DRAWS = 4  # of perturbed weights for one step, where one alone may leave the loss as it is or miss the kinks of ReLU
METRICS = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score")
OPEN = 0.5  # a tolerance from which on a row says next to nothing

Found = tuple[float, str]  # a difference, and the layer it is in
Measure = Callable[[Trace, Trace], Found]


class Quantity(NamedTuple):
    """What is compared."""

    name: str
    measure: Measure
    value: Callable[[Trace], float] | None = None  # where it is one number
    tolerance: float | None = None  # where it is not found by perturbing


class Row(NamedTuple):
    """How far each side is from PyTorch in one quantity."""

    method: str  # "" where the quantity is the model's
    quantity: str
    precision: str
    tolerance: float
    found: dict[str, Found]  # by side: "rule" and "class"
    values: Mapping[str, float] = {}  # by side and of "PyTorch", where the quantity is one number

    @property
    def verdict(self) -> str:
        """ "ok"; "OUT", also for a difference that is not a number; or "open" where rounding alone does too much."""
        if not all(difference <= self.tolerance for difference, _ in self.found.values()):
            return "OUT"
        return "open" if self.tolerance > OPEN else "ok"

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values; None where a number is not finite."""

        def number(value: float) -> float | None:
            return value if np.isfinite(value) else None

        sides = {side: {"difference": number(value), "layer": layer} for side, (value, layer) in self.found.items()}
        values = {side: number(value) for side, value in self.values.items()}
        changed = {"tolerance": number(self.tolerance), "found": sides, "values": values, "verdict": self.verdict}
        return self._asdict() | changed


def compare_models(case: Case) -> list[Row]:
    """The logits, which methods have in common."""
    rows = []
    for precision in ("fp32", "bf16"):
        theirs, ours = pytorch_logits(case, precision), package_logits(case, precision)
        draws = [pytorch_logits(case, precision, draw) for draw in range(DRAWS)]
        for mode, logits in theirs.items():
            tolerance = _tolerance(case, precision, (relative(draw[mode], logits) for draw in draws))
            found = {side: (relative(modes[mode], logits), "") for side, modes in ours.items()}
            rows.append(Row("", f"logits in {mode} mode", precision, tolerance, found))
    return rows


def compare(case: Case, name: str) -> list[Row]:
    """A baseline: the package's rule and class against the harness."""
    rows = []
    for precision, draws in (("fp32", DRAWS), ("bf16", DRAWS), ("fp64", 1)):
        theirs = pytorch_trace(case, name, precision)
        perturbed = [pytorch_trace(case, name, precision, draw) for draw in range(draws)]
        ours = {side: package_trace(case, factory, precision) for side, factory in package_sides(name).items()}
        for quantity, measure, value, fixed in quantities(case)[precision]:
            found = {side: measure(trace, theirs) for side, trace in ours.items()}
            tolerance = fixed or _tolerance(case, precision, (measure(draw, theirs)[0] for draw in perturbed))
            values = {side: value(trace) for side, trace in ({"PyTorch": theirs} | ours).items()} if value else {}
            rows.append(Row(name, quantity, precision, tolerance, found, values))
    return rows


def quantities(case: Case) -> dict[str, list[Quantity]]:
    """What is compared in each precision."""

    def metric(name: str) -> Quantity:
        return Quantity(name, lambda a, b: (abs(a.metrics[name] - b.metrics[name]), ""), lambda a: a.metrics[name])

    def loss(a: Trace, b: Trace) -> Found:
        return relative(np.asarray(a.loss, np.float64), np.asarray(b.loss, np.float64)), ""

    def gradients(a: Trace, b: Trace) -> Found:
        return worst(a.gradients, b.gradients)

    def parameters(a: Trace, b: Trace) -> Found:
        return worst(_parameters(a), _parameters(b))

    def statistics(a: Trace, b: Trace) -> Found:
        return worst(_statistics(a), _statistics(b))

    update, after = partial(beyond_adam, case), f"after {case.steps} steps"
    one_step = [
        Quantity("loss", loss, lambda a: a.loss),
        Quantity("gradients", gradients),
        Quantity("parameters after 1 step", update, tolerance=adam_tolerance(case)),
        Quantity("BatchNorm after 1 step", statistics),
    ]
    return {
        "fp32": one_step,
        "bf16": one_step,
        "fp64": [
            Quantity("loss", loss, lambda a: a.loss),
            Quantity("gradients", gradients),
            Quantity(f"parameters {after}", parameters),
            Quantity(f"BatchNorm {after}", statistics),
            *map(metric, METRICS),
        ],
    }


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two arrays, relative to the largest value."""
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


def worst(ours: Arrays, theirs: Arrays) -> Found:
    """The largest difference, relative to the largest value of its layer.

    Of the layer, not of the array: a bias in front of a BatchNorm has no gradient but rounding. The scale of a running
    mean is the layer's largest standard deviation, since a mean may vanish too.
    """
    assert ours.keys() == theirs.keys()
    found = []
    for key, reference in theirs.items():
        layer, _, kind = key.rpartition(".")
        if kind == "running_mean":
            scale = np.sqrt(theirs[f"{layer}.running_var"].max())
        elif kind == "running_var":
            scale = reference.max()
        else:
            scale = max(np.abs(theirs[name]).max() for name in (f"{layer}.weight", f"{layer}.bias") if name in theirs)
        difference = np.abs(ours[key].astype(np.float64) - reference).max()
        found.append((float(difference / scale) if difference else 0.0, layer))
    return _largest(found)


def beyond_adam(case: Case, ours: Trace, theirs: Trace) -> Found:
    """The largest difference of parameters after one update that that of the gradients does not explain, in updates.

    Adam's first update is lr g / (|g| + eps): lr in size however small g is, so the parameters of two correct programs
    are 2 lr apart where the sign of g is rounding.
    """
    lr, eps = case.protocol.unlearn_lr, case.protocol.adam_eps
    found = []
    for key in theirs.gradients:
        gradients = [trace.gradients[key].astype(np.float64) for trace in (ours, theirs)]
        updates = [lr * g / (np.abs(g) + eps) for g in gradients]
        difference = (ours.state[key].astype(np.float64) + updates[0]) - (theirs.state[key] + updates[1])
        found.append((float(np.abs(difference).max() / lr), key.rpartition(".")[0]))
    return _largest(found)


def adam_tolerance(case: Case) -> float:
    """Of `beyond_adam`: each side rounds the parameter, by u times the largest at most; and 1 - b2, which divides the
    second moment, loses u / (1 - b2) where it is computed in fp32, half of which is left under the root."""
    u = np.finfo(np.float32).eps / 2
    largest = max(np.abs(array).max() for array in jax.tree.leaves(case.variables["params"]))
    return float(2 * u * (1 + largest / case.protocol.unlearn_lr + 0.5 / (1 - case.protocol.adam_b2)))


def _tolerance(case: Case, precision: str, changes: Iterable[float]) -> float:
    # A condition below one would be luck.
    return SIDES_AND_PASSES * max(*changes, rounding(case, precision))


def _largest(found: Sequence[Found]) -> Found:
    # A value that is not a number must not lose against one that is.
    return max(found, key=lambda item: np.inf if np.isnan(item[0]) else item[0])


def _parameters(trace: Trace) -> Arrays:
    return {key: array for key, array in trace.state.items() if "running" not in key}


def _statistics(trace: Trace) -> Arrays:
    return {key: array for key, array in trace.state.items() if "running" in key}


def print_rows(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """A table of the rows: the values, where they are numbers, and how far each side is off."""
    console = Console(file=file, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    sides = list(dict.fromkeys(side for row in rows for side in row.found))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("method", "quantity", "in"):
        table.add_column(name)
    for name in ("PyTorch", *sides, *(f"{side} off by" for side in sides), "tolerance"):
        table.add_column(name, justify="right")
    for name in ("largest in", ""):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row.method or "all",
            row.quantity,
            row.precision,
            *(f"{row.values[side]:.4f}" if side in row.values else "" for side in ("PyTorch", *sides)),
            *(f"{row.found[side][0]:.1e}" if side in row.found else "" for side in sides),
            f"{row.tolerance:.1e}",
            _largest(list(row.found.values()))[1],
            row.verdict,
            style="bold red" if row.verdict == "OUT" else None,
        )
    console.print(table)
    if any(row.verdict == "open" for row in rows):
        console.print(f"open: within its tolerance, but rounding alone may change it by more than {OPEN:.0%}")
