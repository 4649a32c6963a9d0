"""Figures of all methods of a benchmark and protocol."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxunlearn.registry import RETRAIN
from jaxunlearn.report.drawing import (
    COLOURS,
    INK,
    PAPER,
    Look,
    Plot,
    decades,
    finished,
    label,
    legend,
    looks,
    numbers,
    panels,
    rows_of_text,
    style,
)
from jaxunlearn.report.labels import REACH, places
from jaxunlearn.results import published
from jaxunlearn.results.boards import Board, rows_of
from jaxunlearn.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RULE, REFERENCE = Look(COLOURS[0], "o", "-"), Look(COLOURS[1], "D", (0, (5, 2)))
LOOKS = {RULE: "methods", REFERENCE: "references"}
# Areas of attacks on one model, by value of a row.
AREAS = {
    "forget_mia_auc": "confidence",
    "forget_mia_auc_augmented": "confidence, augmented",
    "entropy": "entropy",
    "modified_entropy": "modified entropy",
    "true_probability": "true probability",
}
LEADER = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}  # from a name to its point
MARGIN = 0.04  # of an axis, beyond its points


@style()
def board_plots(board: Board) -> list[Plot]:
    """What its records say of each method, means over seeds; without a plot of what they do not say.

    Raises UserError where matplotlib is missing.
    """
    rows = [row for row in rows_of(board) if row.mean]
    made = [
        _accuracies(rows, board) if rows else None,
        _dots(rows, "average_gap", "Average gap to retrain", "average gap", "0 is as retrained."),
        _dots(
            rows,
            "js",
            "Divergence of the answers to forgotten images from retrain's",
            "divergence, nats",
            "0 is as retrained, .693 the most.",
        ),
        _areas(rows),
        _seconds(rows),
    ]
    return [plot for plot in made if plot]


def _accuracies(rows: Sequence[Row], board: Board) -> Plot:
    figure, (axes,) = panels(height=3.4 + 0.1 * max(0, len(rows) - 8))
    own = [(row.mean["forget_acc"], row.mean["retain_acc"]) for row in rows]
    others = [other.values for other in (published.rows_of(board.bench) if board.official else [])]
    theirs = [(values["forget_acc"], values["retain_acc"]) for values in others]
    if theirs:
        axes.plot(*zip(*theirs, strict=True), "o", color=COLOURS[5], markerfacecolor=PAPER, label="published", zorder=1)
    for look, named in LOOKS.items():
        if shown := [row for row in rows if _look(row) is look]:
            axes.errorbar(
                [row.mean["forget_acc"] for row in shown],
                [row.mean["retain_acc"] for row in shown],
                xerr=[row.half_width.get("forget_acc", 0.0) for row in shown],
                yerr=[row.half_width.get("retain_acc", 0.0) for row in shown],
                linestyle="none",
                marker=look.marker,
                color=look.color,
                elinewidth=1,
                label=named,
            )
    axes.set(xlabel="accuracy on the forgotten class", ylabel="accuracy on retained classes")
    across, up = zip(*own, *theirs, strict=True)
    axes.set(xlim=_around(across), ylim=_around(up))
    legend(axes, figure)
    _name_points(figure, axes, own, [label(_name(row)) for row in rows])
    said = numbers([f"{_name(row)} {kept:.3f} and {gone:.3f}" for row, (gone, kept) in zip(rows, own, strict=True)])
    return finished(
        "accuracies",
        "What is kept and what is gone",
        f"Accuracy on the retained classes and on the forgotten one: {said}.",
        figure,
    )


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis: intervals may go beyond them."""
    room = MARGIN * max(max(values) - min(values), 0.1)
    return min(values) - room, max(values) + room


def _name_points(figure: "Figure", axes: "Axes", points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes the names where there is room, with a line to the point where that is not beside it."""
    texts = [
        axes.annotate(name, point, (0, 0), textcoords="offset points")
        for name, point in zip(names, points, strict=True)
    ]
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()
    scale = 72 / figure.dpi  # points a dot
    at = (axes.transData.transform(points) * scale).tolist()
    sizes = [(box.width * scale, box.height * scale) for box in (text.get_window_extent() for text in texts)]
    left, bottom, right, top = (edge * scale for edge in axes.get_window_extent().extents)
    corners = places(at, sizes, (left, bottom, right, top))
    for text, name, point, (x, y), (left, bottom), (width, height) in zip(
        texts, names, points, at, corners, sizes, strict=True
    ):
        offset = left - x, bottom - y
        far = max(offset[0], -offset[0] - width, offset[1], -offset[1] - height) > 2 * REACH
        text.remove()
        text = axes.annotate(
            name,
            point,
            offset,
            textcoords="offset points",
            verticalalignment="bottom",
            arrowprops=LEADER | {"relpos": (0 if offset[0] > 0 else 1, 0.5)} if far else None,
        )
        text.set_in_layout(False)


def _dots(rows: Sequence[Row], value: str, title: str, axis: str, scale: str) -> Plot | None:
    """A line a method, the smallest value above; where retrain is from the next retrain is a line across."""
    known = [row for row in rows if value in row.mean]
    own = [row.mean[value] for row in known if row.method == RETRAIN]
    shown = sorted((row for row in known if row.method != RETRAIN), key=lambda row: row.mean[value])
    if not shown:
        return None
    figure, axes = rows_of_text([_lines(row) for row in shown])
    for mean in own[:1]:
        axes.axvline(mean, color=REFERENCE.color, linestyle=REFERENCE.dash, label="retrain to another retrain")
        legend(axes, figure)
    for place, row in enumerate(shown):
        look, width = _look(row), row.half_width.get(value, 0.0)
        axes.errorbar(row.mean[value], place, xerr=width, marker=look.marker, color=look.color, elinewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel(axis)
    said = numbers([f"{_name(row)} {row.mean[value]:.3f}" for row in shown])
    between = f" Two retrained models are {own[0]:.3f} apart." if own else ""
    return finished(value.replace("_", "-"), title, f"{title}: {said}. {scale}{between}", figure)


def _areas(rows: Sequence[Row]) -> Plot | None:
    shown = [row for row in rows if any(value in row.mean for value in AREAS)]
    if not shown:
        return None
    figure, axes = rows_of_text([_lines(row) for row in shown], legends=3)
    axes.axvline(0.5, color=INK, linewidth=1)
    for (value, named), look in zip(AREAS.items(), looks(), strict=False):
        if points := [(row.mean[value], place) for place, row in enumerate(shown) if value in row.mean]:
            axes.plot(*zip(*points, strict=True), look.marker, color=look.color, label=named, markerfacecolor="none")
    axes.set_xlabel("area; .5 tells nothing")
    legend(axes, figure)
    known = [named for value, named in AREAS.items() if any(value in row.mean for row in shown)]
    areas = [(row, [row.mean[value] for value in AREAS if value in row.mean]) for row in shown]
    said = numbers([f"{_name(row)} {min(values):.3f} to {max(values):.3f}" for row, values in areas])
    return finished(
        "areas",
        "What attacks tell",
        f"Areas of attacks ({', '.join(known)}) that tell members from non-members, .5 being chance: {said}.",
        figure,
    )


def _seconds(rows: Sequence[Row]) -> Plot | None:
    timed = sorted(((row.seconds, row) for row in rows if row.seconds), key=lambda pair: pair[0])
    if not timed:
        return None
    figure, axes = rows_of_text([_lines(row) for _, row in timed])
    for place, (seconds, row) in enumerate(timed):
        axes.plot(seconds, place, _look(row).marker, color=_look(row).color)
    axes.set_xscale("log")
    decades(axes.xaxis)
    axes.set_xlabel("seconds")
    said = numbers([f"{_name(row)} {seconds:.3g}" for seconds, row in timed])
    return finished(
        "seconds", "Seconds of unlearning and evaluation", f"Mean seconds of unlearning and evaluation: {said}.", figure
    )


def _look(row: Row) -> Look:
    return REFERENCE if row.reference else RULE


def _name(row: Row) -> str:
    """A method and its variant in a line."""
    return label(f"{row.method} {row.variant}".strip(), 60)


def _lines(row: Row) -> str:
    """The same in one or two short lines."""
    return "\n".join(label(text, 22) for text in (row.method, row.variant) if text)
