"""Figures of one method over epochs: the training's own curves, and what the model was worth on the way."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from jaxunlearn.report.drawing import (
    Plot,
    finished,
    label,
    legend,
    looks,
    numbers,
    panels,
    plain_numbers,
    whole_numbers,
)

Records = Sequence[Mapping[str, Any]]

FEW_EPOCHS = 20  # each has a marker
LARGE = 1e3  # a curve that goes beyond is drawn on a logarithmic axis
MOST = 1e30  # beyond which a loss is drawn as if it were this
MOST_CURVES = 8  # of what a rule reports
EVALUATED = {
    "retain_acc": "retained classes",
    "forget_acc": "forgotten class",
    "forget_mia_auc": "attack's area",
    "unlearn_score": "official score",
    "symmetric_score": "symmetric score",
}


def training(records: Records, phase: str, title: str) -> Plot | None:
    curves = _mean_curves([record["curves"][phase] for record in records if record["curves"][phase]])
    curves = {name: curves[name] for name in list(curves)[:MOST_CURVES] if np.isfinite(curves[name]).any()}
    shares = {name: values for name, values in curves.items() if "acc" in name}
    rest = {name: values for name, values in curves.items() if name not in shares}
    groups = [group for group in (rest, shares) if group]
    if not groups:
        return None
    figure, every = panels(len(groups), height=1 + 1.7 * len(groups), sharex=True)
    parts = []
    for axes, group in zip(every, groups, strict=True):
        for (name, values), look in zip(group.items(), looks(), strict=False):
            epochs = np.arange(1, len(values) + 1)
            marker = look.marker if len(values) <= FEW_EPOCHS else None
            axes.plot(
                epochs, values, marker=marker, markersize=4, color=look.color, linestyle=look.dash, label=label(name)
            )
            finite = values[np.isfinite(values)]
            parts.append(f"{label(name)} {finite[0]:.3g} to {finite[-1]:.3g}")
        if max(np.nanmax(np.abs(values)) for values in group.values()) > LARGE:
            axes.set_yscale("symlog", linthresh=1)
            plain_numbers(axes.yaxis)
        legend(axes)
    every[-1].set_xlabel("epoch")
    whole_numbers(every[-1].xaxis)
    return finished(
        {"pretrain": "pretraining", "unlearn": "unlearning"}[phase],
        f"{title}, epoch by epoch",
        f"From the first epoch to the last: {numbers(parts)}.",
        figure,
    )


def evaluated(records: Records) -> Plot | None:
    every = [record["curves"]["evaluated"] for record in records if record["curves"]["evaluated"]]
    # Seeds may have been looked at after other epochs: what is drawn is of the same seeds all along.
    shared = sorted(set.intersection(*(set(one["epoch"]) for one in every))) if every else []
    if not shared:
        return None
    places = [[one["epoch"].index(epoch) for epoch in shared] for one in every]
    curves = _mean_curves(
        [
            {name: [values[k] for k in own] for name, values in one.items() if len(values) == len(one["epoch"])}
            for one, own in zip(every, places, strict=True)
        ]
    )
    figure, (axes,) = panels(height=4)
    parts = []
    for (name, named), look in zip(EVALUATED.items(), looks(), strict=False):
        values = curves[name]
        axes.plot(
            curves["epoch"],
            values,
            color=look.color,
            linestyle=look.dash,
            marker=look.marker,
            markersize=4,
            label=named,
        )
        finite = values[np.isfinite(values)]
        parts += [f"{named} {finite[0]:.3f} to {finite[-1]:.3f}"] if finite.size else []
    axes.set(xlabel="epochs of unlearning", ylim=(-0.02, 1.02))
    whole_numbers(axes.xaxis)
    legend(axes, figure)
    return finished(
        "on-the-way", "What the model is worth on the way", f"On the test images: {numbers(parts)}.", figure
    )


def _mean_curves(curves: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, np.ndarray]:
    """By name the mean over the seeds that have a number there, nan where none has. All as long as the shortest."""
    each = {name: [curve[name] for curve in curves if name in curve] for name in (curves[0] if curves else ())}
    length = min((len(values) for group in each.values() for values in group), default=0)
    return {
        name: np.array([_mean(values) for values in zip(*group, strict=False)])[:length] for name, group in each.items()
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [min(max(value, -MOST), MOST) for value in values if value is not None]
    return fmean(known) if known else np.nan
