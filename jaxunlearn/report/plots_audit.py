"""Figures of audits: many models told from as many that were retrained, example by example."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxunlearn.audit.separation import CURVE
from jaxunlearn.audit.showing import rows
from jaxunlearn.errors import UserError
from jaxunlearn.files import check_writable
from jaxunlearn.report.drawing import (
    HEIGHT,
    INK,
    WIDTH,
    Plot,
    decades,
    finished,
    label,
    legend,
    looks,
    numbers,
    panels,
    require_matplotlib,
    rows_of_text,
    style,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

ATTACKS = {"ulira": "U-LiRA", "rmia": "RMIA"}
STATISTICS = {"true_class": "true class", "retained": "retained classes"}
CUT = CURVE[0] / 2  # where shares below are drawn, which a logarithmic axis has no place for


@style()
def audit_plots(records: Records) -> list[Plot]:
    """Curves of each attack, and all areas, of audits of one benchmark; without those that too few models carry.

    Raises UserError where matplotlib is missing.
    """
    if not records:
        return []
    made = [_curves(records, statistic, attack) for attack in ATTACKS for statistic in STATISTICS]
    return [plot for plot in [*made, _areas(records)] if plot]


def check_plot(path: Path) -> None:
    """Raises UserError where no plot could be made at `path`: before hours of training."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: its name must end in .png or .svg")
    if path.is_dir():
        raise UserError(f"--plot {path}: it is a folder, name a file in it")
    check_writable(path.parent)
    require_matplotlib("--plot")


@style()
def plot_curves(records: Records, path: Path) -> None:
    """Draws the curves of all attacks on one sheet. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure((2 * WIDTH, 2.2 * HEIGHT), layout="constrained")
    parts = [(attack, statistic) for attack in ATTACKS for statistic in STATISTICS]
    for axes, (attack, statistic) in zip(figure.subplots(2, 2).flat, parts, strict=True):
        _draw_curves(axes, records, statistic, attack)
        axes.set_title(f"{ATTACKS[attack]}, {STATISTICS[statistic]}")
    legend(figure.axes[0], figure)
    figure.suptitle(f"{label(records[0]['bench'])}, N = {records[0]['models']}")
    write_figure(figure, path)


def _curves(records: Records, statistic: str, attack: str) -> Plot | None:
    found = {name: attacks[statistic][attack] for name, attacks in rows(records) if attacks[statistic][attack]}
    if not found:
        return None
    figure, (axes,) = panels(height=3.6 + 0.13 * len(found))
    _draw_curves(axes, records, statistic, attack)
    legend(axes, figure)
    caught = numbers([f"{label(name)} {one['tpr']:.3f}" for name, one in found.items()])
    return finished(
        f"{attack}-{statistic.replace('_', '-')}",
        f"{ATTACKS[attack]} by the margin of the {STATISTICS[statistic]}",
        f"Of pairs of an unlearned model and an image, caught at a false positive rate of .01: {caught}.",
        figure,
    )


def _draw_curves(axes: "Axes", records: Records, statistic: str, attack: str) -> None:
    for (name, attacks), look in zip(rows(records), looks(), strict=False):
        if found := attacks[statistic][attack]:
            shares = [max(share, CUT) for share in found["curve"]]
            axes.plot(
                CURVE,
                shares,
                color=look.color,
                linestyle=look.dash,
                marker=look.marker,
                markersize=5,
                markevery=8,
                label=label(name),
            )
    axes.plot(CURVE, CURVE, color=INK, linewidth=0.8, label="chance")
    axes.set(xscale="log", yscale="log", xlim=(CURVE[0], 1), ylim=(CUT, 1.2))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    decades(axes.xaxis)
    decades(axes.yaxis)


def _areas(records: Records) -> Plot | None:
    shown = list(rows(records))
    figure, axes = rows_of_text([label(name, 22) for name, _ in shown], legends=4, lines=2)
    axes.axvline(0.5, color=INK, linewidth=1)
    kinds = [(attack, statistic) for attack in ATTACKS for statistic in STATISTICS]
    parts = []
    for index, ((attack, statistic), look) in enumerate(zip(kinds, looks(), strict=False)):
        known = [(place, attacks[statistic][attack]) for place, (_, attacks) in enumerate(shown)]
        known = [(place, found) for place, found in known if found]
        if known:
            axes.errorbar(
                [found["auc"] for _, found in known],
                [place + 0.16 * (index - 1.5) for place, _ in known],
                xerr=[found["auc_half_width"] for _, found in known],
                linestyle="none",
                marker=look.marker,
                markersize=5,
                color=look.color,
                elinewidth=1,
                label=f"{ATTACKS[attack]}, {STATISTICS[statistic]}",
            )
        parts += [f"{label(shown[place][0])} {found['auc']:.3f}" for place, found in known if not index]
    if not axes.containers:
        return None
    axes.set_xlabel("area; .5 is as if retrained")
    legend(axes, figure)
    return finished(
        "areas",
        "Areas of the attacks, with 95% intervals over models",
        f"By {ATTACKS['ulira']} and the {STATISTICS['true_class']}: {numbers(parts)}; .5 is as if retrained.",
        figure,
    )
