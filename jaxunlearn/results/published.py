"""What is published for the benchmarks, and whether our seeds agree with it.

Pure, float64. A published row is one run of one seed, so it is held against what one more run of ours would give:
Student's t with n - 1 degrees of freedom, at the mean of our n seeds, with the scale s sqrt(1 + 1 / n).
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxunlearn.results.statistics import LEVEL

FEWEST = 3  # seeds that a verdict needs
DECIDED = math.log(10)  # nats between two readings
# By published value, ours: published areas count ties against the member.
QUANTITIES = {
    "retain_acc": "retain_acc",
    "forget_acc": "forget_acc",
    "forget_mia_auc": "forget_mia_auc_published",
    "unlearn_score": "unlearn_score_published",
}
# What the members' images may have been when the published area was measured, by our area of the same.
READINGS = {"clean": "forget_mia_auc", "augmented": "forget_mia_auc_augmented"}


class Published(NamedTuple):
    """One row, of one benchmark."""

    name: str
    kind: str  # "baseline"; of what models submitted "vanilla" or "agent"
    table: str  # "known fill", of the rules implemented here, or "task table", the task's own
    rule: str | None  # ours of the same formula
    values: dict[str, float]  # by `QUANTITIES`, fractions
    digits: int  # decimals that they were published with
    broken: bool  # no measurement: see the benchmark's note

    @property
    def label(self) -> str:
        """Where it is from."""
        return self.table if self.kind == "baseline" else self.kind


class Agreement(NamedTuple):
    """Our seeds beside a published value."""

    seeds: int
    mean: float
    std: float | None  # sample standard deviation (n - 1); None of one seed
    difference: float  # ours minus published
    allowed: float | None  # how far apart they may be; None below `FEWEST` seeds

    @property
    def agrees(self) -> bool | None:
        """Whether the published value could be one more run of ours; None where that cannot be told."""
        return None if self.allowed is None else abs(self.difference) <= self.allowed


@cache
def load() -> dict[str, Any]:
    """The file: `source`, `year`, `address`, `legend` (what the tables are), `columns`, `rows`; by benchmark `notes`
    and `images`, [members, non-members] of its attack."""
    return json.loads(resources.files("jaxunlearn.results").joinpath("published.json").read_text(encoding="utf-8"))


def rows_of(bench: str) -> list[Published]:
    """A benchmark's rows, baselines first."""
    columns, rows = load()["columns"], [row for row in load()["rows"] if bench in row["results"]]
    return [
        Published(
            name=row["name"],
            kind=row["kind"],
            table=row["table"],
            rule=row["rule"],
            values=dict(zip(columns, row["results"][bench], strict=True)),
            digits=row["digits"],
            broken=bench in row.get("broken", ()),
        )
        for row in rows
    ]


def row_to_meet(bench: str, method: str) -> Published | None:
    """The row that a rule of ours stands beside: the known fill where there is one, else the task table's."""
    rows = [row for row in rows_of(bench) if row.rule == method]
    return min(rows, key=lambda row: row.table != "known fill", default=None)


def agreement(ours: Sequence[float], published: float, digits: int) -> Agreement:
    """Whether a published value lies in the 95% prediction interval of one more run.

    |mean - published| may be t(.975, n - 1) s sqrt(1 + 1 / n), and half a unit of the last published digit.

    Args:
      ours: one value a seed, at least one.
      digits: decimals that `published` was rounded to.
    """
    count, mean = len(ours), float(np.mean(ours))
    std = float(np.std(ours, ddof=1)) if count > 1 else None
    allowed = None
    if std is not None and count >= FEWEST:
        allowed = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * _spread(std, count) + 0.5 * 10**-digits
    return Agreement(count, mean, std, mean - published, allowed)


def log_density(ours: Sequence[float], published: float, floor: float) -> float:
    """Log of the density, per unit, of one more run at the published value.

    Args:
      ours: one value a seed, at least two.
      floor: s is at least this, since that of a few seeds may be small by chance. Above 0.
    """
    from scipy.stats import t as student  # a second to import

    scale = _spread(max(float(np.std(ours, ddof=1)), floor), len(ours))
    return float(student.logpdf(published, len(ours) - 1, loc=np.mean(ours), scale=scale))


def _spread(std: float, count: int) -> float:
    """Standard deviation of one more run about the mean of `count`."""
    return std * math.sqrt(1 + 1 / count)


def decision(clean: float, augmented: float) -> str:
    """Which reading two sums of log densities speak for: "clean", "augmented" or "undecided"."""
    if abs(clean - augmented) < DECIDED:
        return "undecided"
    return "clean" if clean > augmented else "augmented"
