"""Figures of one method: its records over seeds, of one protocol and with one set of hyperparameters.

Curves and shares are means over the seeds that have them; counts are added up. Runs that failed count
only where all did.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxunlearn.data.sources import DATASETS
from jaxunlearn.registry import RETRAIN
from jaxunlearn.report.drawing import (
    COLOURS,
    INK,
    Look,
    Plot,
    finished,
    legend,
    numbers,
    panels,
    rows_of_text,
    style,
)
from jaxunlearn.report.plots_epochs import evaluated, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

BEFORE, AFTER, RETRAINED = (
    Look(COLOURS[5], "s", (0, (5, 2))),
    Look(COLOURS[0], "o", "-"),
    Look(COLOURS[1], "D", (0, (1, 1.3))),
)
# The solid line first, so that dashed ones over it are seen.
LOOKS = {"after": AFTER, "before": BEFORE, "retrain": RETRAINED}
MEMBERS, OTHERS = Look(COLOURS[0], "o", "-"), Look(COLOURS[1], "s", (0, (5, 2)))
MOST_NAMED = 20  # classes; of more only the order is shown
MOST_ANSWERS = 10


@style()
def run_plots(records: Records, retrain: Records = ()) -> list[Plot]:
    """What unlearning did; without a plot of what no record says, as those of earlier versions or of models that
    diverged.

    Args:
      records: as `results.records.read` gives them, of one method, protocol and set of hyperparameters.
      retrain: those of `retrain` by the same protocol, to stand beside them where that makes sense.

    Raises UserError where matplotlib is missing.
    """
    if not records:
        return []
    retrain = [record for record in retrain if record["status"] == "ok"]  # else it is no reference
    records = [record for record in records if record["status"] == "ok"] or records
    groups = {"after": records, "before": [r["before"] for r in records if r["before"]], "retrain": retrain}
    runs = {name: [run for run in group if run["companions"]] for name, group in groups.items()}
    before, after = ([run["companions"] for run in runs[name]] for name in ("before", "after"))
    names = class_names(records[0]["protocol"]["dataset"], len(after[0]["class_acc"]) if after else 0)
    forgotten, trained = (
        records[0]["protocol"]["forget_class"],
        "Retraining" if records[0]["method"] == RETRAIN else "Unlearning",
    )
    made = [
        _confidences(before, after),
        _roc(runs),
        training(records, "pretrain", "Pretraining"),
        training(records, "unlearn", trained),
        evaluated(records),
        _classes(_of_classes(before, len(names)), _of_classes(after, len(names)), names, forgotten),
        _answers(_of_classes(after, len(names)), names, forgotten),
        _relearning(runs),
    ]
    return [plot for plot in made if plot]


def _confidences(before: Records, after: Records) -> Plot | None:
    shown = [(title, group) for title, group in (("before", before), ("after", after)) if group]
    if not after:
        return None
    figure, every = panels(len(shown), height=1 + 1.6 * len(shown), sharex=True, sharey=True)
    parts = []
    for axes, (title, group) in zip(every, shown, strict=True):
        for name, named, look in (("members", "members", MEMBERS), ("non_members", "non-members", OTHERS)):
            counts = np.sum([companions["histograms"][name] for companions in group], axis=0)
            shares = counts / max(counts.sum(), 1)
            axes.stairs(
                shares, np.linspace(0, 1, 21), baseline=None, color=look.color, linestyle=look.dash, label=named
            )
            parts.append(f"{title} {shares[-1]:.3f} of {named}")
        axes.set_title(title, loc="left")
        axes.set_ylabel("share")
    every[-1].set(xlabel="maximum softmax probability", xlim=(0, 1))
    legend(every[0], figure)
    return finished(
        "confidences",
        "How sure the model is of the forgotten class's images",
        f"Shares of training images (members) and test images (non-members) by confidence. "
        f"Surer than .95: {numbers(parts)}.",
        figure,
    )


def _roc(runs: Mapping[str, Records]) -> Plot | None:
    if not any(run["companions"]["roc"] for run in runs["after"]):
        return None
    figure, (axes,) = panels(height=4.4)
    rates = np.linspace(0, 1, 101)
    parts = []
    for name, group in runs.items():
        if known := [run for run in group if run["companions"]["roc"]]:
            look, area = LOOKS[name], fmean(run["forget_mia_auc"] for run in known)
            mean = np.mean([run["companions"]["roc"]["members"] for run in known], axis=0)
            axes.plot(rates, mean, color=look.color, linestyle=look.dash, label=f"{name}, area {area:.3f}")
            parts.append(f"{name} area {area:.3f}, {mean[1]:.3f}")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, label="chance, area .5")
    axes.set(xlabel="non-members called members", ylabel="members called members", xlim=(0, 1), ylim=(0, 1.01))
    legend(axes, figure)
    return finished(
        "roc",
        "What the attack finds",
        f"Area of the attack by confidence, and members called so when .01 of non-members are: {numbers(parts)}.",
        figure,
    )


def _of_classes(runs: Records, count: int) -> Records:
    """The companions that speak of so many classes: anybody's record may be wrong in that."""
    return [c for c in runs if {count} == {len(c["class_acc"]), *map(len, c["forgotten_as"].values())}]


def _classes(before: Records, after: Records, names: Sequence[str], forgotten: int) -> Plot | None:
    if not before or not after or forgotten >= len(names):
        return None
    old, new = (np.mean([companions["class_acc"] for companions in group], axis=0) for group in (before, after))
    if len(names) > MOST_NAMED:
        figure = _differences(new - old, forgotten, names)
    else:
        figure, axes = rows_of_text([f"{name} *" if k == forgotten else name for k, name in enumerate(names)])
        places = np.arange(len(old))
        axes.hlines(places, old, new, color=BEFORE.color, linewidth=1)
        axes.plot(old, places, BEFORE.marker, color=BEFORE.color, markerfacecolor="none", label="before")
        axes.plot(new, places, AFTER.marker, color=AFTER.color, label="after")
        axes.set(xlabel="test accuracy (* forgotten)", xlim=(-0.03, 1.03))
        legend(axes, figure)
    return finished(
        "classes",
        "Accuracy class by class",
        f"Test accuracy of {names[forgotten]}, which was to be forgotten, {old[forgotten]:.3f} before and "
        f"{new[forgotten]:.3f} after; {_spoken(names, new - old, forgotten)}.",
        figure,
    )


def _differences(change: np.ndarray, forgotten: int, names: Sequence[str]) -> "Figure":
    order = np.argsort(change, kind="stable")
    figure, (axes,) = panels()
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.step(np.arange(len(change)), change[order], where="mid", color=AFTER.color, label="all classes")
    at, named = order.tolist().index(forgotten), f"{names[forgotten]}, forgotten"
    axes.plot(at, change[forgotten], RETRAINED.marker, color=RETRAINED.color, label=named)
    axes.set(xlabel="classes, by what they lost", ylabel="accuracy after - before")
    axes.set_xticks([])
    legend(axes, figure)
    return figure


def _spoken(names: Sequence[str], change: np.ndarray, forgotten: int) -> str:
    kept = [k for k in np.argsort(change, kind="stable") if k != forgotten]
    mean = fmean(change[kept])
    return f"the retained classes change by {mean:+.3f} in the mean, most {names[kept[0]]}, by {change[kept[0]]:+.3f}"


def _answers(after: Records, names: Sequence[str], forgotten: int) -> Plot | None:
    if not after:
        return None
    counts = {part: np.sum([c["forgotten_as"][part] for c in after], axis=0) for part in ("train", "test")}
    shares = {part: each / max(each.sum(), 1) for part, each in counts.items()}
    order = [k for k in np.argsort(-shares["train"], kind="stable") if shares["train"][k] or shares["test"][k]]
    shown, rest = order[:MOST_ANSWERS], order[MOST_ANSWERS:]
    rows = [f"{names[k]} *" if k == forgotten else names[k] for k in shown] + ["others"] * bool(rest)
    figure, axes = rows_of_text(rows)
    for part, look, offset in (("train", MEMBERS, -0.15), ("test", OTHERS, 0.15)):
        each = shares[part]
        values = [each[k] for k in shown] + [sum(each[k] for k in rest)] * bool(rest)
        face = look.color if part == "train" else "none"
        places = np.arange(len(rows)) + offset
        axes.barh(places, values, 0.28, facecolor=face, edgecolor=look.color, label=f"{part} images")
    axes.set_xlabel("share of images (* forgotten)")
    legend(axes, figure)
    parts = [f"{names[k]} {shares['train'][k]:.3f}" for k in shown]
    return finished(
        "answers", "What forgotten images are answered with", f"Of its training images: {numbers(parts)}.", figure
    )


def _relearning(runs: Mapping[str, Records]) -> Plot | None:
    if not any(run["companions"]["full"] for run in runs["after"]):
        return None
    figure, (axes,) = panels()
    parts = []
    for name, group in runs.items():
        if known := [run["companions"]["full"]["relearning"] for run in group if run["companions"]["full"]]:
            look, mean = LOOKS[name], np.mean(known, axis=0)
            axes.plot(mean, color=look.color, linestyle=look.dash, marker=look.marker, markersize=5, label=name)
            parts.append(f"{name} {fmean(mean[1:]):.3f}")
    axes.set(xlabel="steps of learning it again", ylabel="accuracy on the class", ylim=(-0.02, 1.02))
    legend(axes, figure)
    return finished(
        "relearning",
        "How fast the class comes back",
        f"Mean accuracy on the forgotten class over the steps of learning it again: {numbers(parts)}.",
        figure,
    )


def class_names(dataset: str, count: int) -> list[str]:
    """The names of a data set's classes, by label; numbers where they are not known."""
    source = DATASETS.get(dataset)
    return list(source.classes) if source and len(source.classes) == count else [str(k) for k in range(count)]
