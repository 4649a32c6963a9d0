"""Other labels than an image's own, and other classes than its label's."""

import jax
import jax.numpy as jnp


def random_labels(key: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """i32[B]: for each of `labels`, i32[B], any class, its own as likely as the others."""
    return jax.random.randint(key, labels.shape, 0, num_classes, labels.dtype)


def wrong_labels(key: jax.Array, indices: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """i32[B]: for each of `labels`, i32[B], one of the other classes, all as likely.

    An image keeps its wrong label from step to step: it is a function of `key` and of the image's place, i32[B].
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    further = jax.vmap(lambda key: jax.random.randint(key, (), 1, num_classes, labels.dtype))(keys)
    return (labels + further) % num_classes


def other_classes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits f32[B, C], that of each image's own label, i32[B], at minus infinity: their softmax is over the others."""
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
