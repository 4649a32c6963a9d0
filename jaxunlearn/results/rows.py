"""The rows of the closing table: a method and variant over its seeds, ranked, with what is to be said of it."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

from jaxunlearn.errors import printable
from jaxunlearn.evaluation.flags import FLAGS
from jaxunlearn.registry import REFERENCES, RETRAIN
from jaxunlearn.results.statistics import Components, ranks, t_interval, variance_components

# Values of a record, shown in the closing table; the last is that of `companions.against_retrain`.
SHOWN = (
    "retain_acc",
    "forget_acc",
    "forget_mia_auc",
    "forget_mia_auc_augmented",
    "unlearn_score",
    "symmetric_score",
    "average_gap",
)
AGAINST_RETRAIN = ("average_gap", "tug_of_war", "js")  # of `companions.against_retrain`
ATTACKS = ("entropy", "modified_entropy", "true_probability")  # of `companions.attacks`
MEASURED = (*SHOWN, "tug_of_war", "js", *ATTACKS, "forget_mia_auc_published", "unlearn_score_published")

# By flag: what a row says, and what that means.
WORDS = {
    "collapsed": ("collapsed", "lost more than ten points on the retained classes"),
    "inverted_membership": (
        "inverted",
        "the attack is wrong more often than chance and retraining explain, which reveals as much as being right",
    ),
    "above_retrain": ("above retrain", "a higher unlearn_score than retraining has, which is not better forgetting"),
    "output_mask": ("like a mask", "answers as the pretrained model does without the class: nothing need be erased"),
}


ONE_ORIGINAL = (
    "Weights were given, so all seeds unlearn from one original: what is said of their spread is of unlearning alone."
)

Record = TypeVar("Record", bound=Mapping[str, Any])


class Row(NamedTuple):
    """One line of the table: a method with one set of hyperparameters, over its seeds.

    A seed with several unlearnings is the mean over them. A run is one unlearning of one seed.
    """

    method: str
    variant: str  # 'name=value ...' of the hyperparameters that are not the method's defaults, else ''
    seeds: int
    runs: int
    diverged: int  # runs of them that diverged: counted, never averaged
    untrained: int  # runs of them of whose models one learned nothing: averaged only where all are such
    flags: dict[str, int | None]  # by flag, the runs that have it; None where it can be told of no run
    mean: dict[str, float]  # by value, over the seeds that count and have it; empty if all diverged
    std: dict[str, float]  # sample standard deviation (n - 1) over these; without values of fewer than two seeds
    half_width: dict[str, float]  # of the 95% t-interval of the mean, of the same
    values: dict[str, dict[int, float]]  # by value (`MEASURED`) and seed: what these are made of
    spread: Components | None  # of symmetric_score; None where no seed was unlearned from twice
    seconds: float | None  # mean over all runs, unlearning and evaluation
    devices: tuple[str, ...]  # what they ran on, each once
    commands: tuple[str, ...]  # what gives their records again, each once, of those that say so
    rank: int | None = None  # None: not to be ranked (see `ranks`), or a reference

    @property
    def learned(self) -> bool:
        """Whether it has a run that learned and did not diverge."""
        return self.runs > self.diverged + self.untrained

    @property
    def reference(self) -> bool:
        """Whether it is there to compare with; what diverged or learned nothing is no reference."""
        return self.method in ("pretrained", *REFERENCES) and self.learned

    @property
    def said(self) -> list[str]:
        """The flags in words, with the number of runs where not all have it: ["collapsed", "inverted 2/3"]."""
        counts = [(word, self.flags[name]) for name, (word, _) in WORDS.items()]
        return [word if count == self.runs else f"{word} {count}/{self.runs}" for word, count in counts if count]


def summarize(records: Sequence[Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a method and variant, best mean `symmetric_score` first, rows of which no seed counts last.

    Before them comes `pretrained`, the model that each seed started from (`before`), if any record has one. References
    stand among the others and have no rank.

    Args:
      records: result records of one benchmark and protocol; flags and companions may be missing or None.
      defaults: hyperparameters of each method when nothing is set; of a method not named here all are shown, or, of
        several variants, those in which they differ.
    """
    rows = [_row(*key, group, _mean_seconds(group)) for key, group in grouped(records, defaults).items()]
    rows.sort(key=lambda row: -row.mean["symmetric_score"] if row.learned else float("inf"))
    rows = _compared(rows)
    # The methods of one seed share a pretrained model: it counts once.
    before: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["before"]:
            before.setdefault(record["seed"], []).append(_before(record))
    runs = [max(reversed(known), key=_says) for known in before.values()]
    return [_row("pretrained", "", runs, None), *rows] if runs else rows


def grouped(
    records: Sequence[Record], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], list[Record]]:
    """The records of each row that `summarize` makes of them, but `pretrained`, by its method and variant."""
    groups: dict[tuple[str, str], list[Record]] = {}
    alike = {method: _alike(records, method) for method in {record["method"] for record in records} - {*defaults}}
    for record in records:
        usual = defaults.get(record["method"], alike.get(record["method"], {}))
        changed = {k: v for k, v in record["hyperparameters"].items() if k not in usual or usual[k] != v}
        variant = printable(" ".join(f"{name}={value}" for name, value in changed.items()))
        groups.setdefault((record["method"], variant), []).append(record)
    return groups


def _alike(records: Sequence[Record], method: str) -> dict[str, Any]:
    """The hyperparameters that a method has in all of its records, none where the records differ in nothing."""
    first, *others = [record["hyperparameters"] for record in records if record["method"] == method]
    shared = {name: value for name, value in first.items() if all(name in own and own[name] == value for own in others)}
    return shared if any(own != first for own in others) else {}


def _seconds(record: Mapping[str, Any]) -> float | None:
    """What a method took after pretraining; `prepare_s` is not known apart of earlier versions' records.

    None where some of it was on another kind of device than the record names.
    """
    environment = record.get("environment") or {}
    if any(kind != environment["device_kind"] for kind in environment.get("trained_on", {}).get("unlearn", ())):
        return None
    return sum(record["timing"].get(name) or 0.0 for name in ("prepare_s", "unlearn_s", "evaluate_s"))


def _mean_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    known = [seconds for seconds in map(_seconds, records) if seconds is not None]
    return fmean(known) if known else None


def _says(run: Mapping[str, Any]) -> int:
    """How much a run's record knows: not all are of one version, or were compared with a retrained model."""
    return sum(value is not None for value in _values(run).values())


def _before(record: Mapping[str, Any]) -> dict[str, Any]:
    status = "untrained" if record.get("untrained_in") == "pretrain" else "ok"
    return record["before"] | {"seed": record["seed"], "status": status}


def _row(method: str, variant: str, runs: Sequence[Mapping[str, Any]], seconds: float | None) -> Row:
    finite = [run for run in runs if run["symmetric_score"] is not None]
    learned = [run for run in finite if run.get("status") != "untrained"]
    counting: dict[int, list[dict[str, Any]]] = {}
    for run in learned or finite:
        counting.setdefault(run["seed"], []).append(_values(run))
    columns = {name: _by_seed(counting, name) for name in MEASURED}
    several = {name: list(column.values()) for name, column in columns.items() if len(column) > 1}
    # Retrained models are compared in a ring, each with the next one's: no two comparisons are of models of their own.
    bounded = {name: column for name, column in several.items() if method != RETRAIN or name not in AGAINST_RETRAIN}
    scores = {seed: [values["symmetric_score"] for values in group] for seed, group in counting.items()}
    return Row(
        method=method,
        variant=variant,
        seeds=len({run["seed"] for run in runs}),
        runs=len(runs),
        diverged=len(runs) - len(finite),
        untrained=len(finite) - len(learned),
        flags={name: _count(runs, name) for name in FLAGS},
        mean={name: fmean(column.values()) for name, column in columns.items() if column},
        std={name: stdev(column) for name, column in several.items()},
        half_width={name: width for name, column in bounded.items() if (width := t_interval(column)) is not None},
        values=columns,
        spread=variance_components(scores),
        seconds=seconds,
        devices=tuple(dict.fromkeys(_device(run["environment"]) for run in runs if "environment" in run)),
        commands=tuple(dict.fromkeys(run["command"] for run in runs if run.get("command"))),
    )


def _values(run: Mapping[str, Any]) -> dict[str, float | None]:
    companions = run.get("companions") or {}
    inner = {name: companions.get("against_retrain") or {} for name in AGAINST_RETRAIN}
    inner |= {name: companions.get("attacks") or {} for name in ATTACKS}
    return {name: inner.get(name, run).get(name) for name in MEASURED}


def _device(environment: Mapping[str, Any]) -> str:
    """The devices of a run, on a CPU its processor, such as "4 x NVIDIA H200" and "AMD EPYC, 2 cores"."""
    kind, count, cpu = environment["device_kind"], environment.get("device_count", 1), environment.get("cpu")
    if kind == "cpu" and cpu:
        return f"{cpu['model']}, {cpu['cores']} core{'s' if cpu['cores'] > 1 else ''}"
    return kind if count == 1 else f"{count} x {kind}"


def _by_seed(counting: Mapping[int, Sequence[Mapping[str, Any]]], name: str) -> dict[int, float]:
    known = {seed: [run[name] for run in group if run[name] is not None] for seed, group in counting.items()}
    return {seed: fmean(values) for seed, values in known.items() if values}


def _count(runs: Sequence[Mapping[str, Any]], flag: str) -> int | None:
    known = [value for run in runs if (value := (run.get("flags") or {}).get(flag)) is not None]
    return sum(known) if known else None


def _above(row: Row, ceilings: Sequence[Row]) -> int:
    """How many of a row's runs count as above the best `retrain` row: all that learned, where the mean over the seeds
    that both have, or over all where they share none, is above."""
    best = max(ceilings, key=lambda ceiling: ceiling.mean["unlearn_score"])
    own, limits = row.values["unlearn_score"], best.values["unlearn_score"]
    shared = own.keys() & limits.keys()
    above = fmean(own[seed] for seed in shared or own) > fmean(limits[seed] for seed in shared or limits)
    return (row.runs - row.diverged - row.untrained) * above


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ranks; what the records do not say of `above_retrain`, the best `retrain` row does."""
    found = ranks([row.values["symmetric_score"] if row.learned and not row.reference else {} for row in rows])
    ceilings = [row for row in rows if row.method == RETRAIN and row.reference]
    compared = []
    for row, rank in zip(rows, found, strict=True):
        above = row.flags["above_retrain"]
        if above is None and ceilings and row.learned:
            above = _above(row, ceilings)
        compared.append(row._replace(rank=rank, flags=row.flags | {"above_retrain": above}))
    return compared
