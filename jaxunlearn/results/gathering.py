"""Records from files and folders, whoever wrote them: what is none is said in a line and left out."""

import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.errors import UserError, printable
from jaxunlearn.registry import ships
from jaxunlearn.results import records

NAMES = "seed[0-9]*.json"  # of records in folders; what is named itself may have any name
# What the same run has in common with itself, whatever it was written by.
RUN = ("bench", "method", "seed", "unlearn_seed", "protocol", "hyperparameters")


def gather(places: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """`found` without the paths."""
    kept, refused = found(places)
    return [record for _, record in kept], refused


def found(places: Iterable[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """The records of all files, and of all folders' `seed<k>*.json`, in the order of their paths.

    Returns:
      Where each lies, and records of this version, each run once, the first that is found or one that knows more; and a
      line for each file or folder that was left out.

    Raises:
      UserError: one of the places does not exist.
    """
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}
    refused: list[str] = []

    for path in dict.fromkeys(path for place in places for path in files(place, NAMES, refused)):
        try:
            record = records.read(path)
        except UserError as error:
            refused.append(str(error))
            continue
        if record["bench"] not in BENCHMARKS:
            refused.append(printable(f"left out {path}: there is no benchmark '{record['bench'][:60]}'"))
            continue
        run = _run_of(record)
        kept, left = runs.setdefault(run, (path, record)), (path, record)
        if kept[0] is path:
            continue
        if records.better(record, kept[1]) and not records.better(kept[1], record):
            runs[run], kept, left = left, left, kept
        refused.append(printable(f"left out {left[0]}: the same run as {kept[0]}"))
    return list(runs.values()), refused


def files(place: Path, pattern: str, refused: list[str]) -> Iterator[Path]:
    """A file, or those at any depth of a folder whose names match, in order.

    Args:
      refused: gets a line for each folder that cannot be read.

    Raises:
      UserError: there is no such place.
    """

    def unread(error: OSError) -> None:
        refused.append(printable(f"left out {error.filename}: {os.strerror(error.errno or 0)}"))

    if os.path.isdir(place):
        for folder, folders, names in os.walk(place, onerror=unread):  # follows no links, so it ends
            folders.sort()
            yield from (Path(folder) / name for name in sorted(names) if fnmatch(name, pattern))
    elif os.path.exists(place):
        yield place
    else:
        raise UserError(f"{place}: no such file or folder")


def _run_of(record: dict[str, Any]) -> str:
    # A rule that ships is one rule in all its versions; others may share a name.
    digest = None if ships(record["method"]) else record["rule_digest"]
    images = records.other_images(record)
    own = record | {"hyperparameters": records.completed(record["method"], record["hyperparameters"])}
    parts = [*(own[key] for key in RUN), record["environment"]["device_kind"], images, digest]
    return json.dumps(parts, sort_keys=True)
