"""Gradients of several losses, before they are put together. Trees are of one form; a single array is a tree too.

Dot products and sums of trees are optax's: `tree_vdot` and `tree_add_scale` of `optax.tree_utils`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.tree_utils import tree_add_scale, tree_vdot, tree_zeros_like

PyTree = Any


def zeros(params: PyTree, state: Any) -> PyTree:
    """Where the sum of a pass over gradients begins: a `Pass`'s `init`."""
    return tree_zeros_like(params)


def in_eval_mode(
    context: Any, params: PyTree, state: Any, batch: Any, loss: Callable[[jax.Array, jax.Array], jax.Array]
) -> PyTree:
    """The gradient of loss(logits f32[B, C], labels i32[B]), a scalar, of a batch that the model sees in eval mode."""

    def objective(params: PyTree) -> jax.Array:
        return loss(context.apply_eval(params, state.batch_stats, batch.images), batch.labels)

    return jax.grad(objective)(params)


def norm(gradients: PyTree) -> jax.Array:
    """The Euclidean norm of the tree as one vector: a scalar. (optax's own has another name in every version.)"""
    return jnp.sqrt(tree_vdot(gradients, gradients))


def clip(gradients: PyTree, longest: float) -> PyTree:
    """The tree, shrunk to the norm `longest` where it is longer."""
    return optax.clip_by_global_norm(longest).update(gradients, optax.EmptyState())[0]


def without_conflict(gradient: PyTree, other: PyTree) -> PyTree:
    """`gradient` without its part along `other`, where the two trees, each as one vector, point away from each other.

    Tensor by tensor it is `jax.tree.map(without_conflict, gradient, other)`. Where `other` is 0 nothing is taken.
    """
    square = tree_vdot(other, other)
    along = jnp.minimum(tree_vdot(gradient, other), 0) / jnp.where(square > 0, square, 1)
    return tree_add_scale(gradient, -along, other)
