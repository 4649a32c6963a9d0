"""Where every random number comes from: the seed, what it is for, the epoch, the step, and nothing else."""

import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """What randomness is for. Values are part of what a pretrained model is: never renumber them."""

    INIT = 0  # initial weights
    PRETRAIN = 1  # order, augmentation and dropout of pretraining
    UNLEARN = 2  # the same of unlearning: all rules of a seed see the same batches
    RULE = 3  # what a rule draws before its first step
    ATTACK = 4  # augmentation of the forget images, where the attack sees them augmented


def stream_key(key: jax.Array, stream: Stream, *path: int | jax.Array) -> jax.Array:
    """The key of a stream at `path`, such as (epoch, step), under a seed's key."""
    return functools.reduce(jax.random.fold_in, path, jax.random.fold_in(key, stream))


def seed_keys(seeds: Sequence[int]) -> jax.Array:
    """The keys of `seeds`, an array of S keys."""
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
