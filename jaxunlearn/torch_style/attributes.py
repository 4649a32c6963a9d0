"""The attributes of a method as arrays, which the loop carries, and the rest, which never changes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxunlearn.errors import UserError
from jaxunlearn.torch_style.models import Model

ARRAY = object()  # stands for an array


class Rest(NamedTuple):
    """A pytree without its arrays."""

    structure: Any
    leaves: list[Any]


def split(tree: Any) -> tuple[list[jax.Array], Rest]:
    """The JAX arrays in a pytree, in order, and what is left of it."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, Rest(structure, [ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in leaves])


def join(arrays: Sequence[jax.Array], rest: Rest) -> Any:
    """The pytree that was split: its containers and models are new ones."""
    remaining = iter(arrays)
    return jax.tree.unflatten(rest.structure, [next(remaining) if leaf is ARRAY else leaf for leaf in rest.leaves])


class Attributes(NamedTuple):
    """What is on `self` between steps, by name."""

    arrays: dict[str, list[jax.Array]]
    rest: dict[str, Rest]


def first_attributes(method: Any, model: Model) -> Attributes:
    """What the method has set up. Raises UserError where the model that learns is among it."""
    arrays, rest = {}, {}
    for name, value in vars(method).items():
        if any(part is model for part in jax.tree.leaves(value, is_leaf=lambda part: part is model)):
            raise UserError(f"self.{name} is the model that learns: write copy.deepcopy(model)")
        arrays[name], rest[name] = split(value)
    return Attributes(arrays, rest)


def next_arrays(method: Any, before: Attributes) -> dict[str, list[jax.Array]]:
    """The arrays that a step, or `prepare`, has left. Raises UserError where anything else has changed."""
    after, rest = {}, {}
    for name, value in vars(method).items():
        after[name], rest[name] = split(value)
    for name in before.rest | rest:
        here = f"self.{name}"
        old, new = before.arrays.get(name, []), after.get(name, [])
        if len(new) > len(old):
            advice = f"create it in setup(self, model), such as {here} = {_example(vars(method)[name])}"
            raise UserError(f"{here} holds an array that was not there before the first step: {advice}")
        if len(new) < len(old) or name not in before.rest or not _same(before.rest[name], rest[name]):
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


def _same(old: Rest, new: Rest) -> bool:
    if old.structure != new.structure:
        return False
    return all(
        a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)
        for a, b in zip(old.leaves, new.leaves, strict=True)
    )
