"""What a report is made of, from files and folders: records of runs, of audits and of speed, whoever wrote them."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.audit.keeping import read_audit
from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.errors import UserError
from jaxunlearn.results import gathering, records

# In folders: where a command writes what is no record of a run.
AUDITS, SPEEDS = ("audit", "*-N*.json"), ("speed", "*.json")


class Found(NamedTuple):
    """All that was found, in the order of the paths."""

    records: list[tuple[Path, dict[str, Any]]]
    audits: list[dict[str, Any]]
    speeds: list[dict[str, Any]]
    refused: list[str]  # a line for each file or folder that was left out

    @classmethod
    def of_runs(cls, records: Iterable[tuple[Path, dict[str, Any]]]) -> "Found":
        """Of records that a run has just made, and where they lie."""
        return cls([(path, json.loads(json.dumps(record))) for path, record in records], [], [], [])


def gather(places: Iterable[Path]) -> Found:
    """What is in files and folders. Of folders the records of runs, and what lies in folders `audit` and `speed`.

    Raises:
      UserError: one of the places does not exist.
    """
    refused: list[str] = []
    runs: list[Path] = []
    audits: dict[Path, None] = {}
    speeds: dict[Path, None] = {}
    for place in places:
        if os.path.isdir(place):
            runs.append(place)
            audits |= dict.fromkeys(_below(place, *AUDITS, refused))
            speeds |= dict.fromkeys(_below(place, *SPEEDS, refused))
        else:
            _kind(place, runs, audits, speeds)
    found, left_out = gathering.found(runs)
    refused = list(dict.fromkeys(left_out + refused))
    return Found(found, _read(audits, _audit, refused), _read(speeds, _speed, refused), refused)


def _below(place: Path, folder: str, pattern: str, refused: list[str]) -> Iterator[Path]:
    """Files of a pattern in folders of this name, which `place` may be itself: what is above it says nothing."""
    own = place.resolve().name
    for path in gathering.files(place, pattern, refused):
        folders = own, *path.relative_to(place).parts[:-1]
        if folder in folders and not fnmatch(path.name, gathering.NAMES):  # those are runs, of a rule of that name
            yield path


def _kind(path: Path, runs: list[Path], audits: dict[Path, None], speeds: dict[Path, None]) -> None:
    """Puts a file that was named with its like; what nobody knows is taken for a run's, to be refused as one."""
    try:
        keys = records.parse(path).keys()
    except ValueError:
        keys = {}.keys()
    if "attacks" in keys:
        audits[path] = None
    elif "quantities" in keys:
        speeds[path] = None
    else:
        runs.append(path)


def _read(paths: Iterable[Path], read: Callable[[Path], dict[str, Any]], refused: list[str]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            record = read(path)
        except UserError as error:
            refused.append(str(error))
        else:
            found.setdefault(json.dumps(record, sort_keys=True), record)
    return list(found.values())


def _audit(path: Path) -> dict[str, Any]:
    record = read_audit(path)
    if record["bench"] not in BENCHMARKS:
        raise UserError(f"left out {path}: there is no benchmark '{record['bench'][:60]}'")
    device, dataset = record["environment"].get("device_kind"), record["dataset"]
    if not isinstance(device, str) or not {"digest", "verified"} <= set(dataset):
        raise UserError(f"cannot read the audit {path}: it does not say what it was made on, or of which images")
    return record


def _speed(path: Path) -> dict[str, Any]:
    """A record of `jaxunlearn speed --json`, of which what is shown is checked."""
    try:
        record = records.parse(path)
        _check_speed(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is no record of speed"
        raise UserError(f"cannot read the record of speed {path}: {why}") from error
    return record


def _check_speed(record: Mapping[str, Any]) -> None:
    """Raises ValueError, or what comes of looking for what is not there."""
    against, rows = record["against"], record["quantities"].items()
    texts = [record["bench"], record["precision"], record["environment"]["device_kind"]]
    texts += [text for name, row in rows for text in (name, row["unit"])] + ([against] if against is not None else [])
    if not all(isinstance(text, str) for text in texts) or record["bench"] not in BENCHMARKS:
        raise ValueError("it is no record of speed")
    if not all(isinstance(record[name], int) for name in ("pairs", "seeds")):
        raise ValueError("its pairs and seeds are no whole numbers")
    for _, row in rows:
        bursts = [row["ours_bursts"], row[f"{against}_bursts"]] if against else []
        rates = [row["ours"], *([row[against], row["ratio"]] if against else []), *(x for some in bursts for x in some)]
        if not all(_positive(rate) for rate in rates) or len({len(some) for some in bursts}) > 1 or [] in bursts:
            raise ValueError("a rate of it is no positive number, or is missing")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
