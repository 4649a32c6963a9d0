"""Result records: one JSON file a benchmark, method and seed.

A record is a plain dictionary whose keys keep the order in which the run built it; the README lists them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError
from jaxunlearn.files import exists, write_atomically


def record_path(out: Path, bench: str, method: str, seed: int, differs: Mapping[str, Any]) -> Path:
    """OUT/<bench>/<method>[-<8 hex>]/seed<k>.json.

    Args:
      differs: protocol fields and hyperparameters that are not the benchmark's own, JSON values. Their hash,
        independent of key order, keeps such runs apart from the benchmark's; empty means none. `1` and `1.0` hash
        differently.
    """
    suffix = ""
    if differs:
        canonical = json.dumps(differs, sort_keys=True, separators=(",", ":"), allow_nan=False)
        suffix = "-" + hashlib.sha256(canonical.encode()).hexdigest()[:8]
    return out / bench / f"{method}{suffix}" / f"seed{seed}.json"


def check_overwrite(path: Path, protocol: Mapping[str, Any], hyperparameters: Mapping[str, Any], force: bool) -> None:
    """Fails now, rather than after hours of training, if `write` would not be able to store a result at `path`.

    Raises:
      UserError: the folder cannot be written, or (without `force`) the record there has another protocol or other
        hyperparameters, or cannot be read.
    """
    try:
        found = exists(path)
    except OSError as error:  # a method's name, for one, can be too long
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None
    if force or not found:
        return
    differences = _differences(_read(path), protocol, hyperparameters)
    if differences:
        raise UserError(
            f"{path} holds a result of other settings ({'; '.join(differences)}): "
            "pass --force to replace it, or another --out"
        )


def write(path: Path, record: Mapping[str, Any], force: bool) -> bool:
    """Stores `record` as indented JSON, atomically: `path` holds the old record or the new one, whole, at any time.

    An old record is replaced if `force`, or if it has the same protocol and hyperparameters and is not better: in
    status ("ok" is better than any other), or as one of the official images where the new one is of others.

    Returns:
      Whether the record was written; False means the old one was kept.

    Raises:
      UserError: the old record cannot be read (without `force`).
      ValueError, TypeError: `record` has a NaN, an infinity or something that is no JSON value.
    """
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if not force and path.exists():
        old = _read(path)
        better = (old["status"] == "ok" and record["status"] != "ok") or (_verified(old) and not _verified(record))
        if better or _differences(old, record["protocol"], record["hyperparameters"]):
            return False
    write_atomically(path, text.encode())
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the record {path} ({reason}): pass --force to replace it") from error
    settings = [record.get(key) for key in ("protocol", "hyperparameters")] if isinstance(record, dict) else [None]
    if not (all(isinstance(setting, dict) for setting in settings) and "status" in record):
        raise UserError(f"{path} is not a result record: pass --force to replace it")
    return record


def _verified(record: Mapping[str, Any]) -> bool:
    dataset = record.get("dataset")  # older records have none
    return isinstance(dataset, dict) and dataset.get("verified") is True


def _differences(old: Mapping[str, Any], protocol: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> list[str]:
    """One 'name: OLD there, NEW here' a setting that differs, compared as JSON values (a tuple is a list there)."""
    found = []
    for before, now in ((old["protocol"], protocol), (old["hyperparameters"], hyperparameters)):
        now = json.loads(json.dumps(now))
        for name in [*now, *(name for name in before if name not in now)]:
            if name not in before or name not in now or before[name] != now[name]:
                there, here = (json.dumps(side[name]) if name in side else "absent" for side in (before, now))
                found.append(f"{name}: {there} there, {here} here")
    return found
