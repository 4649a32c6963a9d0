"""The attributes of a method as arrays, which the loop carries, and the rest, which never changes."""

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.errors import UserError
from jaxunlearn.files import is_of_others
from jaxunlearn.torch_style.models import Model

ARRAY = object()  # stands for an array


class Rest(NamedTuple):
    """A pytree without its arrays."""

    structure: Any
    leaves: list[Any]
    marks: Sequence[Any] = ()  # of attributes; equal while no leaf has changed, in place or not


def split(tree: Any) -> tuple[list[jax.Array], Rest]:
    """The JAX arrays in a pytree, in order, and what is left of it."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, Rest(structure, [ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in leaves])


def join(arrays: Sequence[jax.Array], rest: Rest) -> Any:
    """The pytree that was split: its containers and models are new ones."""
    remaining = iter(arrays)
    return jax.tree.unflatten(rest.structure, [next(remaining) if leaf is ARRAY else leaf for leaf in rest.leaves])


def put(old: Any, new: Any) -> Any:
    """`new`, of the structure of `old`: the dicts, lists and models of `old` themselves, which other names may have."""
    if isinstance(old, Model):
        old.params, old.batch_stats = new.params, new.batch_stats
        return old
    if isinstance(old, dict):
        old.update({name: put(value, new[name]) for name, value in old.items()})
        return old
    if isinstance(old, list):
        old[:] = map(put, old, new)
        return old
    if type(old) is tuple:
        return tuple(map(put, old, new))
    return new


class Attributes(NamedTuple):
    """What is on `self` between steps, by name."""

    arrays: dict[str, list[jax.Array]]
    rest: dict[str, Rest]


def first_attributes(method: Any, model: Model) -> Attributes:
    """What the method has set up. Its models draw from now on what `model` draws.

    Raises UserError where the model that learns is among it, one thing that can change under two names, or an array
    where it is not seen.
    """
    arrays, rest, places = {}, {}, dict[int, str]()
    for name, value in vars(method).items():
        for part in _changeable(value):
            if part is model:
                raise UserError(f"self.{name} is the model that learns: write copy.deepcopy(model)")
            if id(part) in places and split(part)[0]:
                other = places[id(part)]
                again = "in it twice" if other == name else f"self.{other} too"
                raise UserError(f"self.{name} holds what is {again}, and each would change by itself: keep it once")
            places[id(part)] = name
            if isinstance(part, Model):
                part._generator = model._generator
        arrays[name], rest[name] = _marked(value)
        if hidden := [leaf for leaf in rest[name].leaves if _hides_arrays(leaf)]:
            kind = type(hidden[0]).__name__
            raise UserError(
                f"self.{name}: arrays in a {kind} are not carried on: keep them in a dict, a list or a model"
            )
    return Attributes(arrays, rest)


def next_arrays(method: Any, before: Attributes) -> dict[str, list[jax.Array]]:
    """The arrays that a step, or `prepare`, has left. Raises UserError where anything else has changed."""
    after, rest = {}, {}
    for name, value in vars(method).items():
        after[name], rest[name] = _marked(value)
    for name in before.rest | rest:
        here = f"self.{name}"
        old, new = before.arrays.get(name, []), after.get(name, [])
        if len(new) > len(old):
            advice = f"create it in setup(self, model), such as {here} = {_example(vars(method)[name])}"
            raise UserError(f"{here} holds an array that was not there before the first step: {advice}")
        known = name in before.rest
        if len(new) < len(old) or not known or not _same(before.rest[name], rest.get(name)):
            if known and name in rest and _modes(join(old, before.rest[name])) != _modes(vars(method)[name]):
                raise UserError(f"{here} changes its mode in a step: call .eval() or .train() in setup(self, model)")
            advice = "only arrays that setup(self, model) has made can change, such as jnp.zeros(())"
            raise UserError(f"{here} changes in a step, which is traced only once: {advice}")
        for first, second in zip(old, new, strict=True):
            if (first.shape, first.dtype) != (second.shape, second.dtype):
                forms = " to ".join(f"{array.dtype}{list(array.shape)}" for array in (first, second))
                raise UserError(f"{here} changes in a step from {forms}: keep its shape and dtype")
    return after


def _example(value: Any) -> str:
    """What `setup` could make, where a step has made `value`."""
    if any(isinstance(part, Model) for part in jax.tree.leaves(value, is_leaf=lambda part: isinstance(part, Model))):
        return "copy.deepcopy(model).eval()"
    if isinstance(value, jax.Array):
        return f"jnp.zeros({value.shape}, '{value.dtype}')"
    return "{name: jnp.zeros_like(p) for name, p in model.named_parameters()}"


def _marked(value: Any) -> tuple[list[jax.Array], Rest]:
    """An attribute split, with its marks: not at every closure, since arrays of NumPy are hashed for them."""
    arrays, rest = split(value)
    return arrays, rest._replace(marks=[_mark(leaf, set()) for leaf in rest.leaves])


def _same(old: Rest, new: Rest | None) -> bool:
    return new is not None and old.structure == new.structure and old.marks == new.marks


def _changeable(value: Any) -> Iterator[Any]:
    """The models, dicts and lists in a value."""
    if isinstance(value, Model | dict | list):
        yield value
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _changeable(part)


def _modes(value: Any) -> list[tuple[bool, bool]]:
    return [(part.training, part._batch_norm) for part in _changeable(value) if isinstance(part, Model)]


def _hides_arrays(leaf: Any) -> bool:
    """Whether there are JAX arrays in what is no pytree."""
    inside = vars(leaf).values() if _is_users(leaf) else leaf if isinstance(leaf, set | deque) else ()
    return any(isinstance(part, jax.Array) for part in jax.tree.leaves(list(inside)))


def _is_users(leaf: Any) -> bool:
    """Whether it is an object of a class of the user's own: those of installed packages may keep what they like."""
    if not hasattr(leaf, "__dict__") or isinstance(leaf, type | ModuleType | FunctionType):
        return False
    return not is_of_others(getattr(sys.modules.get(type(leaf).__module__), "__file__", None) or "")


def _mark(leaf: Any, seen: set[int]) -> Any:
    """Equal while a leaf, or what is in it, has not changed."""
    if isinstance(leaf, bool | int | float | str):
        return type(leaf), leaf
    if id(leaf) in seen:
        return id(leaf)
    seen = seen | {id(leaf)}
    content: Any = ()
    if isinstance(leaf, np.ndarray):
        content = leaf.dtype, leaf.shape, hashlib.sha256(leaf.tobytes()).digest()
    elif isinstance(leaf, dict):
        content = [(name, _mark(part, seen)) for name, part in leaf.items()]
    elif isinstance(leaf, list | tuple | set | deque):
        content = [_mark(part, seen) for part in leaf]
    elif _is_users(leaf):
        content = _mark(vars(leaf), seen)
    return id(leaf), content
