"""Records of audits: one JSON file a benchmark, method and number of models; `schema.json` says what is in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError
from jaxunlearn.files import write_atomically
from jaxunlearn.registry import Method
from jaxunlearn.results import records, schema
from jaxunlearn.runs.request import Request


def audit_path(request: Request, method: Method) -> Path:
    """OUT/audit/<bench>/<method>[-<8 hex>]-N<models>.json, hashed as the models' folders are."""
    folder = request.record_path(method, 0).parent
    return request.out / "audit" / folder.parent.name / f"{folder.name}-N{len(request.seeds)}.json"


def write_audit(path: Path, record: Mapping[str, Any]) -> None:
    """Stores a record, whole or not at all, in place of an earlier one: it is made anew of the same models.

    Raises:
      ValueError: it is not what the schema says.
      OSError: it cannot be written.
    """
    schema.check(record, "audit")
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def read_audit(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
      UserError: there is none, or it is not what the schema says.
    """
    try:
        record = records.parse(path)
        schema.check(record, "audit")
    except ValueError as error:
        raise UserError(f"cannot read the audit {path}: {error}") from error
    return record
