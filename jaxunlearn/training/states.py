"""A state of training: its leaves by name, its copies on the host, and back on the devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxunlearn.devices.sharding import fetch, place_seeds
from jaxunlearn.training.checkpoints import Leaves


def leaves_of(tree: Any) -> dict[str, Any]:
    """Its leaves by place, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def key_data(tree: Any) -> Any:
    """The tree with arrays of numbers in place of its arrays of keys."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(abstract: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), abstract)  # it takes no abstract value
    return found[0]


def to_host(state: Any, count: int) -> list[Any]:
    """Copies of each seed's state: the buffers behind are donated to the next step."""
    fetched = fetch(key_data(state))
    return [jax.tree.map(lambda x, i=i: np.array(x[i]), fetched) for i in range(count)]


def on_device(states: Sequence[Leaves], abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """The states on `mesh`, the seed axis in front."""
    placed: Any = place_seeds({name: np.stack([state[name] for state in states]) for name in states[0]}, mesh)
    leaves = [
        jax.random.wrap_key_data(placed[name], impl=_key_impl(leaf)) if _is_key(leaf) else placed[name]
        for name, leaf in leaves_of(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
