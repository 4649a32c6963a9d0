"""Which layer of a file is which of the model where their names differ: by roles, shapes and order.

Most shapes of a network repeat, so only a file that keeps its layers in the network's order can be read. Names are
asked whether they agree with that: those that count must count upwards, and a BatchNorm must stand beside its
convolution, which tells a network that normalises behind its convolutions from one that normalises before them.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxunlearn.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # by state_dict key
Role = tuple[Any, ...]  # what a layer is: the names and shapes of its arrays


def norm_behind(conv: str) -> str:
    """The BatchNorm behind a convolution of ours: `bn1` of `conv1`, else the next number: `features.1` of `.0`."""
    parent, dot, name = conv.rpartition(".")
    return parent + dot + (str(int(name) + 1) if name.isdigit() else name.replace("conv", "bn"))


def match(given: Shapes, expected: Shapes, ordered: bool) -> dict[str, str] | None:
    """{layer of `expected`: layer of `given`}; None where their roles and shapes do not agree one to one.

    Args:
      given: of a file, in its order if it is `ordered`.
      expected: of a model, whose names in natural order are in the network's.

    Raises:
      UserError: where they agree, but order and names do not say which layer is which.
    """
    theirs, ours = _roles(given), _roles(expected)
    if sorted(map(repr, theirs.values())) != sorted(map(repr, ours.values())):
        return None
    if not ordered:
        raise UserError("its layers have other names, and .safetensors keeps no order to know them by: save an .npz")
    _check_counting(theirs)
    behind = _norms(theirs)
    own_behind = {layer: norm_behind(layer) for layer in ours if _is_conv(ours[layer])}
    mine = [layer for layer in sorted(ours, key=_natural) if layer not in own_behind.values()]
    others = [layer for layer in theirs if layer not in behind.values()]
    _check_order([theirs[layer] for layer in others], [ours[layer] for layer in mine])
    found = {}
    for layer in mine:
        found[layer] = next(other for other in others if theirs[other] == ours[layer])
        others.remove(found[layer])
        if layer in own_behind:
            found[own_behind[layer]] = behind[found[layer]]
    return found


def _roles(shapes: Shapes) -> dict[str, Role]:
    """{layer: what it is}, in the order of `shapes`. A bias of a convolution makes no difference."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        layer, _, name = key.rpartition(".")
        parts.setdefault(layer, {})[name] = shape
    for arrays in parts.values():
        if len(arrays.get("weight", ())) == 4:
            arrays.pop("bias", None)
    return {layer: tuple(sorted(arrays.items())) for layer, arrays in parts.items()}


def _is_conv(role: Role) -> bool:
    return len(dict(role).get("weight", ())) == 4


def _norms(layers: Mapping[str, Role]) -> dict[str, str]:
    """{convolution: the BatchNorm behind it}: the first of as many channels that none has taken, if names allow it."""
    waiting: list[str] = []
    behind = {}
    for layer, role in layers.items():
        arrays = dict(role)
        if _is_conv(role):
            waiting.append(layer)
        elif "running_mean" in arrays:
            fitting = [conv for conv in waiting if dict(layers[conv])["weight"][:1] == arrays["running_mean"]]
            allowed = [conv for conv in fitting if _beside(conv, layer)]
            if not allowed:
                before = f"such as {fitting[0]}" if fitting else "of which there is none"
                raise UserError(
                    f"its layers have other names, and the BatchNorm {layer} does not stand beside a convolution "
                    f"before it, {before}: is it another network?"
                )
            conv = min(allowed, key=lambda conv: conv.rpartition(".")[0] != layer.rpartition(".")[0])
            waiting.remove(conv)
            behind[conv] = layer
    return behind


def _beside(conv: str, norm: str) -> bool:
    """Whether names let a BatchNorm be the one behind a convolution: in one place, or in two of the same number."""
    (place, _, name), (other, _, its) = conv.rpartition("."), norm.rpartition(".")
    if place == other and name.isdigit() and its.isdigit():
        return True
    same = all(a == b for a, b in zip(_numbers(name), _numbers(its), strict=False))  # conv_1_3x3, bn_1
    return same and (place == other or _numbers(place) == _numbers(other))


def _check_counting(layers: Mapping[str, Role]) -> None:
    """Raises UserError where of two layers alike, whose names differ in numbers alone, the later has the lower."""
    last: dict[tuple[Role, str], str] = {}
    for layer, role in layers.items():
        kind = (role, re.sub(r"\d+", "#", layer))
        if kind in last and _numbers(layer) < _numbers(last[kind]):
            raise UserError(
                f"its layers have other names and are not in order, by which alone they could be known: {last[kind]} "
                f"stands before {layer}"
            )
        last[kind] = layer


def _check_order(theirs: list[Role], ours: list[Role]) -> None:
    """Raises UserError where the layers whose shapes repeat come in another order. A shortcut may stand anywhere."""
    repeated = [[role for role in roles if roles.count(role) > 1] for roles in (theirs, ours)]
    if repeated[0] != repeated[1]:
        raise UserError("its layers have other names and are not in the network's order, by which they could be known")


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
