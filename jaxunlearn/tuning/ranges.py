"""Where tuning looks for hyperparameters, and the points it tries there, which are the same on every machine."""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.errors import UserError
from jaxunlearn.registry import Method

MOST = 1_000  # trials of a method
LARGEST = 2**31 - 1  # int
WIDE = 10  # times its low end that a range's high end must be to be looked through by its logarithm


class Range(NamedTuple):
    """Both ends belong to it; ints where the hyperparameter is one."""

    low: Any
    high: Any

    def at(self, share: float) -> Any:
        """The value at a share from 0 to 1 of the way from low to high.

        An int is any of the range's, all as likely. A float is by its logarithm where both ends are above 0 and the
        high one at least ten times the low one; it has four digits, so that it reads well and is the same everywhere.
        """
        low, high = self
        if isinstance(low, int):
            return min(low + int(share * (high - low + 1)), high)
        if low > 0 and high >= WIDE * low:
            value = math.exp((1 - share) * math.log(low) + share * math.log(high))
        else:
            value = (1 - share) * low + share * high
        return min(max(float(f"{value:.4g}"), low), high)


def ranges_of(method: Method, asked: Mapping[str, str], held: Collection[str]) -> dict[str, Range]:
    """The ranges of a method's hyperparameters, by name.

    A range is what is `asked` for ("LOW:HIGH"), else what the rule's file says, else, of a float above 0, from a tenth
    of its default to ten times that, and of an int from 1 on, from 1 to twice its default. What has none, and what is
    `held`, stays as it is.

    Raises UserError for a range that is none, or of something that is no number, and where what is held has one.
    """
    said = {} if method.ranges is None else method.ranges
    if not isinstance(said, Mapping):
        raise UserError(f"method '{method.name}': its `ranges` must be a dict such as {{'share': (0.1, 0.9)}}")
    for name in [*said, *asked]:
        if name not in method.defaults:
            raise UserError(f"method '{method.name}' has no hyperparameter '{name}' to have a range")
    for name in asked:
        if name in held:
            place = f"{method.name}.{name}"
            raise UserError(f"--range {place}={asked[name]}: --set {place} holds it at one value, give one of the two")
    found: dict[str, Range | None] = {}
    for name, default in method.defaults.items():
        if name in held:
            continue
        if name in asked:
            ends = _parsed(asked[name], type(default))
            found[name] = _checked(f"--range {method.name}.{name}={asked[name]}", ends, default)
        elif name in said:
            found[name] = _checked(f"method '{method.name}': ranges['{name}']", said[name], default)
        else:
            found[name] = _usual(default)
    return {name: own for name, own in found.items() if own}


def points(method: Method, ranges: Mapping[str, Range], count: int) -> list[dict[str, Any]]:
    """At most `count` different sets of hyperparameters, the method's own first; fewer where there are no more.

    The others are those of a Sobol sequence, shifted by a hash of the method's and the hyperparameter's name: more of
    them begin with fewer.
    """
    own = method.hyperparameters
    different: dict[str, dict[str, Any]] = {}
    for one in itertools.chain([own], ({**own, **drawn} for drawn in _drawn(method.name, ranges, count))):
        different.setdefault(json.dumps(one, sort_keys=True), one)
    return list(different.values())[:count]


def _drawn(title: str, ranges: Mapping[str, Range], count: int) -> Iterator[dict[str, Any]]:
    if not ranges:
        return
    from scipy.stats import qmc  # a second to import

    shift = np.array([_hash(f"{title}.{name}") for name in ranges])
    shares = qmc.Sobol(len(ranges), scramble=False).random_base2(math.ceil(math.log2(count)) + 4)  # ints come again
    for row in (shares + shift) % 1:
        yield {name: own.at(float(share)) for share, (name, own) in zip(row, ranges.items(), strict=True)}


def _hash(text: str) -> float:
    """A number from 0 to 1 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _usual(default: Any) -> Range | None:
    if isinstance(default, bool):
        return None
    if isinstance(default, int):
        return Range(1, 2 * default) if default >= 1 else None
    return Range(default / 10, default * 10) if isinstance(default, float) and default > 0 else None


def _parsed(text: str, kind: type) -> list[Any]:
    """The numbers in "LOW:HIGH"; none where they are not of this kind."""
    try:
        return [kind(end) for end in text.split(":")] if kind in (int, float) else []
    except ValueError:
        return []


def _checked(place: str, ends: Any, default: Any) -> Range:
    kind = type(default)
    if kind not in (int, float):
        raise UserError(f"{place}: only a number has a range, and this one is {default!r} by default")
    pair = list(ends) if isinstance(ends, tuple | list) else []
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
    if len(pair) != 2 or not (whole or (kind is float and all(isinstance(end, int | float) for end in pair))):
        raise UserError(f"{place}: write two {'whole ' if kind is int else ''}numbers, the low end and the high end")
    low, high = pair
    if not -sys.float_info.max <= low <= high <= sys.float_info.max:
        raise UserError(f"{place}: the low end must be a number, and the high end one that is no lower")
    if kind is int and max(-low, high) > LARGEST:
        raise UserError(f"{place}: whole numbers go to {LARGEST}")
    low, high = kind(low), kind(high)
    return Range(low, high)
