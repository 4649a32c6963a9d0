"""Which parameters a rule changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def last_layers(names: Sequence[str], params: Mapping[str, Any], count: int) -> set[str]:
    """The names of the last `count` layers, all where there are fewer: convolutions and linear layers, each with the
    BatchNorm behind it. A convolution in a shortcut counts as any other; a BatchNorm that is behind none that lacks one
    belongs to the layer before it, or to the first.

    Args:
      names: of everything that has parameters, in the order in which it computes, as of `Context.layers`.
      params: by those names; what has a "kernel" is a convolution or linear layer, anything else a BatchNorm.
    """
    layers: list[list[str]] = []
    bare: list[list[str]] = []
    front: list[str] = []
    for name in names:
        if "kernel" in params[name]:
            layers.append([name])
            bare.append(layers[-1])
        else:  # behind the last without one: a shortcut stands between a block's last convolution and its BatchNorm
            (bare.pop() if bare else layers[-1] if layers else front).append(name)
    layers[0] += front
    return {name for layer in layers[max(len(layers) - count, 0) :] for name in layer}


def largest(tree: PyTree, share: float | jax.Array) -> PyTree:
    """Booleans, true for the `share` of all values of the tree together, f32 arrays, that is largest, and what equals
    the least of those."""
    values = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    place = (1 - share) * values.size
    least = jnp.sort(values)[jnp.round(place).astype(int) if isinstance(place, jax.Array) else round(place)]
    return jax.tree.map(lambda leaf: leaf >= least, tree)


def freeze_outside(params: PyTree, mask: PyTree) -> PyTree:
    """The same parameters; no gradient flows into any for which the `mask`, a tree of booleans, is false."""
    return jax.tree.map(lambda leaf, on: jnp.where(on, leaf, jax.lax.stop_gradient(leaf)), params, mask)
