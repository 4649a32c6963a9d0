"""Figures of a measurement of speed."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.report.drawing import COLOURS, INK, Plot, finished, label, numbers, rows_of_text, style


@style()
def speed_plots(record: Mapping[str, Any]) -> list[Plot]:
    """How much faster each step is than the other side's, as `speed --json` has it; nothing where there is none.

    Raises UserError where matplotlib is missing.
    """
    other, rows = record["against"], record["quantities"]
    if not other or not rows:
        return []
    rates = [f"{_rate(row['ours'])} : {_rate(row[other])} {label(row['unit'])}" for row in rows.values()]
    figure, axes = rows_of_text([f"{label(name)}\n{rate}" for name, rate in zip(rows, rates, strict=True)])
    axes.axvline(1, color=INK, linewidth=1)
    for place, row in enumerate(rows.values()):
        pairs = [ours / theirs for ours, theirs in zip(row["ours_bursts"], row[f"{other}_bursts"], strict=True)]
        reach = [[max(0, row["ratio"] - min(pairs))], [max(0, max(pairs) - row["ratio"])]]
        axes.errorbar(row["ratio"], place, xerr=reach, marker="o", color=COLOURS[0], elinewidth=1)
    axes.set_xlabel(f"ours / {label(other)}")
    ratios = [f"{label(name)} {row['ratio']:.2f}" for name, row in rows.items()]
    return [
        finished(
            "speed",
            f"Speed beside {label(other)}",
            f"Medians of the ratios of rates, and their range over {record['pairs']} pairs: {numbers(ratios)}.",
            figure,
        )
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
