"""Tables of many runs, from their records alone: results, how they compare with what is published, and the rules."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.evaluation.flags import COLLAPSE
from jaxunlearn.evaluation.metrics import auc_standard_error
from jaxunlearn.registry import get_method, names, sentence, ships
from jaxunlearn.results import published
from jaxunlearn.results.records import other_images, usual
from jaxunlearn.results.rows import ONE_ORIGINAL, SHOWN, Row, grouped, summarize
from jaxunlearn.results.sheets import Cell, Estimate, Sheet

OWN = "the benchmark's own protocol"
COMPUTED = ("device", "precision")  # in what and on what: no part of what is computed
INTERVAL = "± is half the 95% interval of the mean over seeds."


class Board(NamedTuple):
    """Records of one benchmark that were made by one protocol, of the same images, on one kind of device."""

    bench: str
    differs: Mapping[str, Any]  # from the benchmark's own protocol on a CPU, by field, "device" and "images"
    records: Sequence[dict[str, Any]]

    @property
    def given(self) -> bool:
        """Whether the original was given."""
        return "init_weights" in self.differs

    @property
    def official(self) -> bool:
        """Whether published rows may stand beside it: the benchmark's own protocol, or unlearning of given weights."""
        own = {*COMPUTED, "mia_augment"}  # what the published attack saw is not known
        own |= {"init_weights", "resnet_shortcut"} if self.given else set()  # a shortcut is the weights'
        return set(self.differs) <= own

    @property
    def about(self) -> dict[str, str]:
        """The benchmark, and in words what differs."""
        settings = {"given weights": str(self.differs["init_weights"])[:8]} if self.given else {}
        settings |= {name: value for name, value in self.differs.items() if name != "init_weights"}
        texts = (f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items())
        return {"bench": self.bench, "protocol": ", ".join(texts) or OWN}


def boards(records: Iterable[dict[str, Any]]) -> list[Board]:
    """The records by benchmark, protocol, images and kind of device: official ones first, then given weights, others.

    Args:
      records: as files have them, of benchmarks of the package.
    """
    groups: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {}
    for record in records:
        own = json.loads(json.dumps(dataclasses.asdict(BENCHMARKS[record["bench"]])))
        differs = {name: value for name, value in record["protocol"].items() if name not in own or value != own[name]}
        if (device := record["environment"]["device_kind"]) != "cpu":
            differs["device"] = device
        if images := other_images(record):
            differs["images"] = images
        key = json.dumps([record["bench"], differs], sort_keys=True)
        groups.setdefault(key, (record["bench"], differs, []))[2].append(record)
    order = list(BENCHMARKS)

    def place(board: Board) -> tuple[Any, ...]:
        return order.index(board.bench), not board.official, board.given, len(board.differs), board.about["protocol"]

    return sorted((Board(*group) for group in groups.values()), key=place)


def results(board: Board) -> Sheet:
    """All that the records say of each method, and what is published of them."""
    rows = rows_of(board)
    cells = [_cells(row) for row in rows]
    facts, notes = published.load(), _notes(board, rows)
    if board.official and (others := published.rows_of(board.bench)):
        nothing: dict[str, Cell] = dict.fromkeys(cells[0])
        for row in others:
            means: dict[str, Cell] = {name: Estimate(value, None) for name, value in row.values.items()}
            label = row.label if row.rule in (None, row.name) else f"{row.label}: {row.rule}"
            cells.append(nothing | means | {"method": row.name, "seeds": 1, "published": label})
        notes += [f"Published rows: {facts['source']} ({facts['address']}, {facts['year']}). {facts['legend']}"]
        notes += [facts["notes"][board.bench]] if board.bench in facts["notes"] else []
    return Sheet(board.about, cells, notes, below="commands")


def short(board: Board) -> Sheet:
    """The scores of each method, and the published score of the same rule."""
    rows = rows_of(board)
    kept = ("rank", "method", "variant", *SHOWN, "seeds", "runs", "diverged", "untrained")
    cells = [{name: cell for name, cell in _cells(row).items() if name in kept} for row in rows]
    for row, shown in zip(rows, cells, strict=True):
        other = _row_to_meet(board, row)
        shown["published"] = f"{other.values['unlearn_score']:.{other.digits}f}" if other and not other.broken else None
    return Sheet(board.about, cells, _notes(board, rows))


def verdicts(board: Board) -> Sheet | None:
    """Our seeds beside the published value of each quantity; None where nothing is published beside these records."""
    cells: list[dict[str, Cell]] = []
    for row, other in _meetings(board):
        for name, own in published.QUANTITIES.items():
            found = published.agreement(list(row.values[own].values()), other.values[name], other.digits)
            verdict = f"needs {published.FEWEST} seeds" if found.agrees is None else ("no", "yes")[found.agrees]
            cells.append(
                {
                    "method": row.method,
                    "row": other.label if other.name == row.method else f"{other.label}: {other.name}",
                    "quantity": name,
                    "published": other.values[name],
                    "ours": found.mean,
                    "s": found.std,
                    "seeds": found.seeds,
                    "difference": found.difference,
                    "allowed": found.allowed,
                    "agrees": "not a measurement" if other.broken else verdict,
                }
            )
    return Sheet(board.about, cells, [ONE_ORIGINAL] if board.given else []) if cells else None


def readings(board: Board) -> Sheet | None:
    """How likely the published areas are if the attack saw clean, and if it saw augmented images of the members."""
    if not board.official or "mia_augment" in board.differs or board.bench not in published.load()["images"]:
        return None
    floor = auc_standard_error(*published.load()["images"][board.bench])
    cells: list[dict[str, Cell]] = []
    densities: list[dict[str, float]] = []  # of the rules that tell
    for row, other in _meetings(board):
        area = other.values["forget_mia_auc"]
        ours = {reading: row.values[own] for reading, own in published.READINGS.items()}
        both = set.intersection(*map(set, ours.values()))  # else they would differ by what seeds they are of, too
        if not (why := _unread(row, other, ours, len(both), floor)):
            ours = {reading: {seed: areas[seed] for seed in sorted(both)} for reading, areas in ours.items()}
        values = {reading: list(areas.values()) for reading, areas in ours.items()}
        found = {} if why else {r: published.log_density(areas, area, floor) for r, areas in values.items()}
        densities += [found] if found else []
        shown: dict[str, Cell] = {"method": row.method, "seeds": len(both) if found else row.seeds, "published": area}
        shown |= {f"{reading} images": fmean(areas) if areas else None for reading, areas in values.items()}
        shown |= {f"log density, {reading}": found.get(reading) for reading in ours}
        cells.append(shown | {"left out": why})
    if not cells:
        return None
    sums = {reading: sum(found[reading] for found in densities) for reading in published.READINGS}
    if densities:
        last: dict[str, Cell] = {f"log density, {reading}": value for reading, value in sums.items()}
        cells.append(dict.fromkeys(cells[0]) | {"method": "sum"} | last)
    decided = published.decision(**sums)
    said = "" if decided == "undecided" else " images of the members"
    return Sheet(board.about, cells, [f"What this decides: {decided}{said}.", *([ONE_ORIGINAL] if board.given else [])])


def rules() -> Sheet:
    """What each rule that ships says of itself in its docstring."""
    factories = {name: get_method(name).factory for name in names()}
    said = ("Reads", "Differs", "Values")
    return Sheet(
        {}, [{"rule": name} | {word.lower(): sentence(f, word) for word in said} for name, f in factories.items()]
    )


def runs(board: Board) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records of each of `rows_of`, but of `pretrained`, by its method and variant."""
    return grouped(*_named(board))


def rows_of(board: Board) -> list[Row]:
    """The rows of a board. Rules of others that share a name are told apart by their digests."""
    return summarize(*_named(board))


def _meetings(board: Board) -> Iterator[tuple[Row, published.Published]]:
    """The rows that have a published one to meet, with it; of one unlearning of each seed, as that is one run."""
    single = board._replace(records=[record for record in board.records if not record["unlearn_seed"]])
    for row in rows_of(single):
        if row.learned and (other := _row_to_meet(board, row)):
            yield row, other


def _named(board: Board) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The records, under such names, and defaults by method."""
    records = [_marked(record) for record in board.records]
    digests = {(record["method"], record["rule_digest"]) for record in records}
    shared = Counter(method for method, _ in digests if not ships(method))
    named = [
        record | {"method": f"{record['method']} {str(record['rule_digest'])[:8]}"}
        if shared[record["method"]] > 1
        else record
        for record in records
    ]
    return named, defaults_of(records)


def defaults_of(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hyperparameters of those rules of the records that ship, when nothing is set, as a file has them."""
    known = {record["method"] for record in records} & set(names())
    return {name: usual(name) for name in known}


def _marked(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a model that collapsed says so: the first ones did not, but have what tells it."""
    before, after = (record["before"] or {}).get("retain_acc"), record["retain_acc"]
    if record["flags"]["collapsed"] is not None or before is None or after is None:
        return record
    return record | {"flags": record["flags"] | {"collapsed": before - after > COLLAPSE}}


def _row_to_meet(board: Board, row: Row) -> published.Published | None:
    """The published row of the same rule with its own settings, where the protocol allows to compare."""
    return published.row_to_meet(board.bench, row.method) if board.official and not row.variant else None


def _unread(
    row: Row, other: published.Published, ours: Mapping[str, Mapping[int, float]], both: int, floor: float
) -> str:
    """Why an area tells nothing of what the attack saw; empty where it does.

    Args:
      ours: our areas, by reading and seed.
      both: how many seeds have all of them.
    """
    if other.broken:
        return "not a measurement"
    if both < published.FEWEST:
        few = [reading for reading, areas in ours.items() if len(areas) < published.FEWEST] or ours
        return f"needs {published.FEWEST} seeds with an area of {' and of '.join(few)} images"
    tied = abs(row.mean["forget_mia_auc"] - row.mean["forget_mia_auc_published"])
    return "ties decide" if tied > floor else ""


def _cells(row: Row) -> dict[str, Cell]:
    measured: dict[str, Cell] = {
        name: Estimate(row.mean[name], row.half_width.get(name)) if name in row.mean else None
        for name in (*SHOWN, "tug_of_war")
    }
    return {
        "rank": "ref" if row.reference else row.rank,
        "method": row.method,
        "variant": row.variant,
        **measured,
        "seeds": row.seeds,
        "runs": None if row.runs == row.seeds else row.runs,
        "diverged": row.diverged or None,
        "untrained": row.untrained or None,
        "reads": get_method(row.method).reads if ships(row.method) else None,
        "flags": row.said,
        "hardware": row.devices,
        "seconds": row.seconds,
        "published": None,
        "commands": row.commands,
    }


def _notes(board: Board, rows: Sequence[Row]) -> list[str]:
    notes = [f"{INTERVAL} {ONE_ORIGINAL}" if board.given else INTERVAL] if any(row.half_width for row in rows) else []
    versions: dict[str, set[str]] = {}
    for record in board.records:
        if ships(record["method"]) and record["rule_digest"]:
            run = json.dumps([record["method"], record["hyperparameters"]], sort_keys=True)
            versions.setdefault(run, set()).add(record["rule_digest"])
    mixed = dict.fromkeys(json.loads(run)[0] for run, digests in versions.items() if len(digests) > 1)
    return notes + [f"Seeds of {method} are of more than one version of its code." for method in mixed]
