"""What a record is: `schema.json` says it, `check` holds records to it, `upgrade` brings older ones to it."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.errors import printable

VERSION = 3
# What came after the first records of a version: as it was there.
LATER: dict[str, dict[str, Any]] = {"protocol": {"validation": False}, "environment": {"trained_on": {}}}

LONGEST = 60  # characters of a value in a message
TYPES = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "an object",
}
LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "minItems": "at least",
    "maxItems": "at most",
    "exclusiveMinimum": "more than",
    "exclusiveMaximum": "less than",
}


@cache
def load_schema(room: str = "results") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a room's records, as it is in its `schema.json`."""
    return json.loads(resources.files(f"jaxunlearn.{room}").joinpath("schema.json").read_text(encoding="utf-8"))


def check(record: Any, room: str = "results") -> None:
    """Raises ValueError where `record` is not what a room's schema says: one line, which names the first wrong place.

    A tuple is a list, as it will be in the file. NaN and the infinities are no numbers, except where the schema leaves
    open what there is: in hyperparameters and in fields that it does not know.
    """
    for error in _validator(room).iter_errors(record):
        raise ValueError(_line(error))


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any version as one of `VERSION`, in that version's order; `record` itself stays as it is.

    What earlier versions did not know is None; fields that the protocol got later have their defaults, which is what
    runs did before; `attempts` and `environment.trained_on` are empty, `unlearn_seed` 0. In version 1 `unlearn_s` had
    in it what is now `prepare_s`. With `protocol.mia_augment` the area of version 1 was the one of augmented images.
    What does not fit stays where it was, for `check` to find.

    Raises:
      ValueError: the record is of a newer version.
    """
    version, new, known = record.get("schema"), dict(record), load_schema()["properties"]
    if isinstance(version, int) and version > VERSION:
        raise ValueError("written by a newer version of jaxunlearn: update it")
    for name, later in LATER.items():
        if isinstance(value := new.get(name), dict):
            new[name] = _ordered(later | value, known[name]["properties"])
    if "schema" in record:
        return _from_version_2(new) if version == 2 else new
    given = {"unlearn_seed": 0, "curves": {}, "scored": "last", "dataset": {}, "attempts": {}} | new
    flags = {"collapsed": given.pop("collapsed", None)}
    new = dict.fromkeys(known) | given | {"schema": VERSION, "flags": flags}
    for name in ("before", "curves", "flags", "dataset", "timing", "throughput", "environment"):
        new[name] = _filled(new[name], known[name])
    if isinstance(environment := new["environment"], dict):
        environment["cpu"] = _filled(environment["cpu"], known["environment"]["properties"]["cpu"])
    if isinstance(protocol := new["protocol"], dict):
        defaults = {field.name: field.default for field in dataclasses.fields(Protocol)}
        settings = (defaults | protocol).items()
        new["protocol"] = {name: value for name, value in settings if value is not dataclasses.MISSING}
        for metrics in (new, new["before"]) if protocol.get("mia_augment") is True else ():
            if isinstance(metrics, dict):
                metrics["forget_mia_auc_augmented"] = metrics["forget_mia_auc"]
                metrics["forget_mia_auc"] = None
    return new


def _from_version_2(record: dict[str, Any]) -> dict[str, Any]:
    schema = load_schema()
    known, beside = schema["properties"], schema["$defs"]["companions"]["properties"]

    def whole(metrics: dict[str, Any]) -> dict[str, Any]:
        found = metrics.get("companions")
        return metrics | {"companions": _ordered({"roc": None} | found, beside)} if isinstance(found, dict) else metrics

    new = whole(record) | {"schema": VERSION, "scored": "last"}
    if isinstance(before := new.get("before"), dict):
        new["before"] = whole(before)
    if isinstance(curves := new.get("curves"), dict):
        new["curves"] = {**curves, "evaluated": None}
    return _ordered(new, known)


def _ordered(value: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    return {name: value[name] for name in known if name in value} | value


def _filled(value: Any, schema: Mapping[str, Any]) -> Any:
    """An object with None for what it lacks, in the schema's order; anything else as it is."""
    return dict.fromkeys(schema["properties"]) | value if isinstance(value, dict) else value


@cache
def _validator(room: str) -> Any:
    from jsonschema import Draft202012Validator, validators  # slow to import, and not every run reads or writes

    types = Draft202012Validator.TYPE_CHECKER
    finite = types.redefine(
        "number", lambda _, value: types.is_type(value, "number") and (isinstance(value, int) or math.isfinite(value))
    )
    both = finite.redefine("array", lambda _, value: isinstance(value, list | tuple))
    return validators.extend(Draft202012Validator, type_checker=both)(load_schema(room))


def _line(error: Any) -> str:
    """What is wrong, of an error of jsonschema's, in our words."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path]
    place = printable("".join(steps).removeprefix("."))
    kind, wanted, value = error.validator, error.validator_value, error.instance
    if kind == "required":
        return f"{place or 'it'} lacks '{next(name for name in wanted if name not in value)}'"
    if kind == "additionalProperties":
        return _unknown(place, value, error.schema["properties"])
    if kind in ("minItems", "maxItems"):
        return f"{place} has {len(value)} values: it must have {LIMITS[kind]} {wanted}"
    because = f", since {error.schema['$comment']}" if kind == "type" and "$comment" in error.schema else ""
    return f"{place or 'it'} is {_shown(value)}: it must be {_wanted(kind, wanted, error.schema)}{because}"


def _unknown(place: str, value: Mapping[str, Any], known: Iterable[str]) -> str:
    name = next(name for name in value if name not in known)
    nearest = difflib.get_close_matches(name, known, n=1)
    advice = f": did you mean '{nearest[0]}'?" if nearest else ""
    return f"{place or 'it'} has an unknown key '{printable(name)}'{advice}"


def _wanted(kind: str, wanted: Any, schema: Mapping[str, Any]) -> str:
    if kind in LIMITS:
        return f"{LIMITS[kind]} {wanted}"
    if kind == "type":
        return " or ".join(TYPES[name] for name in ([wanted] if isinstance(wanted, str) else wanted))
    if kind in ("enum", "const"):
        return " or ".join(map(_shown, wanted if kind == "enum" else [wanted]))
    return schema["$comment"] if kind == "pattern" else "a text that is not empty"


def _shown(value: Any) -> str:
    """A value as in the file, shortened; of a list or an object, only what it is."""
    if isinstance(value, list | tuple | dict):
        return TYPES["object" if isinstance(value, dict) else "array"]
    try:
        text = json.dumps(value)
    except TypeError:
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
