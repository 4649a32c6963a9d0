"""Result records: one JSON file a benchmark, method and seed.

A record is a plain dictionary whose keys keep the order in which the run built it; `schema.json` says what they are.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError
from jaxunlearn.files import exists, write_atomically
from jaxunlearn.registry import get_method, names
from jaxunlearn.results import schema

# What no record comes near: bytes of a file, digits of a number, objects and lists inside each other.
LARGEST, LONGEST, DEEPEST = 2**24, 300, 100


def record_path(
    out: Path, bench: str, method: str, seed: int, differs: Mapping[str, Any], unlearn_seed: int = 0
) -> Path:
    """OUT/<bench>/<method>[-<8 hex>]/seed<k>[-unlearn<j>].json.

    Args:
      differs: protocol fields and hyperparameters that are not the benchmark's own, JSON values. Their hash,
        independent of key order, keeps such runs apart from the benchmark's; empty means none. `1` and `1.0` hash
        differently.
      unlearn_seed: named only if it is not 0.
    """
    suffix = ""
    if differs:
        canonical = json.dumps(differs, sort_keys=True, separators=(",", ":"), allow_nan=False)
        suffix = "-" + hashlib.sha256(canonical.encode()).hexdigest()[:8]
    again = f"-unlearn{unlearn_seed}" if unlearn_seed else ""
    return out / bench / f"{method}{suffix}" / f"seed{seed}{again}.json"


def read(path: Path) -> dict[str, Any]:
    """The record in a file, of this version or an older one, as one of this version.

    Raises:
      UserError: there is none that can be read, it is of a newer version, or it is not what the schema says.
    """
    try:
        record = schema.upgrade(parse(path))
        schema.check(record)
    except ValueError as error:
        raise UserError(f"cannot read the record {path}: {error}") from error
    return record


def check_overwrite(path: Path, protocol: Mapping[str, Any], hyperparameters: Mapping[str, Any], force: bool) -> None:
    """Fails now, rather than after hours of training, if `write` would not be able to store a result at `path`.

    Raises:
      UserError: the folder cannot be written, or (without `force`) the record there has another protocol or other
        hyperparameters, is of a newer version, or cannot be read.
    """
    try:
        found = exists(path)
    except OSError as error:  # a method's name, for one, can be too long
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None
    if force or not found:
        return
    differences = _differences(_existing(path), protocol, hyperparameters)
    if differences:
        raise UserError(
            f"{path} holds a result of other settings ({'; '.join(differences)}): "
            "pass --force to replace it, or another --out"
        )


def check_images(path: Path, digest: str, verified: bool, force: bool) -> None:
    """Fails as `check_overwrite` does where the record at `path` is of other images, and these are not the official.

    Raises UserError, without `force`.
    """
    if force or verified or not exists(path):
        return
    known = (_existing(path).get("dataset") or {}).get("digest", digest)
    if known != digest:
        raise UserError(f"{path} holds a result of other images: pass --force to replace it, or another --out")


def write(path: Path, record: Mapping[str, Any], force: bool) -> bool:
    """Stores `record` as indented JSON, atomically: `path` holds the old record or the new one, whole, at any time.

    An old record is replaced if `force`, or if it has the same protocol and hyperparameters and is not better: in
    status ("ok" is better than any other), as one of the official images where the new one is of others, or as one that
    is compared with a retrained model, evaluated in full or evaluated on the way where the new one is not.

    Returns:
      Whether the record was written; False means the old one was kept.

    Raises:
      UserError: the old record cannot be read, or is of a newer version (without `force`).
      ValueError, TypeError: `record` is not what the schema says.
    """
    schema.check(record)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if not force and path.exists():
        old = _existing(path)
        if better(old, record) or _differences(old, record["protocol"], record["hyperparameters"]):
            return False
    write_atomically(path, text.encode())
    return True


def better(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether something would be lost if the new record of a run replaced the old one.

    What longer runs said of other code of a user's rule is not: it is of the rule no more.
    """
    status = old["status"] == "ok" and new["status"] != "ok"
    edited = old.get("rule_digest") not in (None, new["rule_digest"]) and new["method"] not in names()
    extras = bool(_extras(old) - _extras(new)) and not edited
    return status or (_verified(old) and not _verified(new)) or extras


def _existing(path: Path) -> dict[str, Any]:
    """The record that one would replace, as it is there: what is compared is what was written then."""
    try:
        record = parse(path)
        schema.upgrade(record)  # refuses newer ones
    except ValueError as error:
        raise UserError(f"cannot read the record {path} ({error}): pass --force to replace it") from error
    if not all(isinstance(record.get(key), dict) for key in ("protocol", "hyperparameters")) or "status" not in record:
        raise UserError(f"{path} is not a result record: pass --force to replace it")
    return record | {"protocol": schema.LATER["protocol"] | record["protocol"]}


def usual(method: str) -> dict[str, Any]:
    """The hyperparameters of a rule that ships when nothing is set, as a file has them."""
    return json.loads(json.dumps(get_method(method).defaults))


def completed(method: str | None, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """A record's hyperparameters and, at their defaults, those that a rule which ships was given later. JSON values."""
    return (usual(method) if method in names() else {}) | dict(hyperparameters)


def parse(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, in one line, for what is none or is none that `write` wrote."""
    if not os.path.isfile(path):  # a device or a pipe may never end
        raise ValueError("no such file")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(os.strerror(error.errno or 0)) from error
    if len(content) > LARGEST:
        raise ValueError("it is too large for a record")
    try:
        record = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_whole_number,
        )
        _check_depth(record, DEEPEST)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply for a record") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a result record")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has '{twice}' twice")
    return made


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _whole_number(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _check_depth(value: Any, levels: int) -> None:
    if not levels:
        raise RecursionError
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, levels - 1)


def _extras(record: Mapping[str, Any]) -> set[str]:
    """Which of what not every run computes is there."""
    beside = record.get("companions")  # older records have none
    if record["status"] != "ok" or not isinstance(beside, dict):
        return set()
    extras = {name for name in ("against_retrain", "full") if beside.get(name) is not None}
    curves = record.get("curves")
    evaluated = curves.get("evaluated") if isinstance(curves, dict) else None
    return extras | {f"epoch {epoch}" for epoch in (evaluated or {}).get("epoch", ())}


def _verified(record: Mapping[str, Any]) -> bool:
    dataset = record.get("dataset")  # older records have none
    return isinstance(dataset, dict) and dataset.get("verified") is True


def other_images(record: Mapping[str, Any]) -> str | None:
    """The digest of a record's images where they are not the official ones; None where they are, or nobody knows."""
    dataset = record["dataset"]
    return str(dataset["digest"]) if dataset["verified"] is False else None


def _differences(old: Mapping[str, Any], protocol: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> list[str]:
    """One 'name: OLD there, NEW here' a setting that differs, compared as JSON values (a tuple is a list there)."""
    found = []
    there, here = (completed(old.get("method"), own) for own in (old["hyperparameters"], hyperparameters))
    for before, now in ((old["protocol"], protocol), (there, here)):
        now = json.loads(json.dumps(now))
        for name in [*now, *(name for name in before if name not in now)]:
            if name not in before or name not in now or before[name] != now[name]:
                said = [json.dumps(side[name]) if name in side else "absent" for side in (before, now)]
                found.append(f"{name}: {said[0]} there, {said[1]} here")
    return found
