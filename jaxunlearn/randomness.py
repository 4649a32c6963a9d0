"""Where every random number comes from: the seed, what it is for, the epoch, the step, and nothing else."""

import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """What randomness is for. Values are part of what a pretrained model is: never renumber them."""

    INIT = 0  # initial weights
    PRETRAIN = 1  # augmentation and dropout of pretraining
    PRETRAIN_ORDER = 2
    UNLEARN = 3  # augmentation and dropout of unlearning, what a rule draws in a step
    UNLEARN_ORDER = 4  # with the augmentation, the same for all rules of a seed: they see the same batches
    RULE = 5  # what a rule draws before its first step
    ATTACK = 6  # augmentation of the forget images, where the attack sees them augmented
    ATTEMPT = 7  # a seed's further attempts at pretraining, after one that learned nothing
    RELEARN = 8  # the fresh head, order and batches of relearning: the same for all models of a seed
    UNLEARN_SEED = 9  # further unlearnings of one original
    PASS = 10  # what a rule draws in a pass, and which images that sees


def seed_key(seed: int | jax.Array) -> jax.Array:
    """A seed's own key. Of one generator, whichever JAX is set to (`jax_default_prng_impl`).

    What a model is would else depend on that setting, and XLA's own generator (`rbg`) does not give seeds that are
    vmapped the numbers that each has alone.
    """
    return jax.random.key(seed, impl="threefry2x32")


def abstract_key() -> jax.ShapeDtypeStruct:
    """The shape and dtype of a `seed_key`."""
    key: jax.ShapeDtypeStruct = jax.eval_shape(seed_key, 0)
    return key


def stream_key(key: jax.Array, stream: Stream, *path: int | jax.Array) -> jax.Array:
    """The key of a stream at `path`, such as (epoch, step), under a seed's key."""
    return functools.reduce(jax.random.fold_in, path, jax.random.fold_in(key, stream))


def step_keys(key: jax.Array, stream: Stream, epoch: jax.Array, steps: int, uses: int) -> jax.Array:
    """The keys of every step of an epoch, one for each of its `uses`: [steps, uses].

    Made once an epoch: every derivation inside the step itself would add a fifth of a second to its compilation.
    """
    own = stream_key(key, stream, epoch)
    return jax.vmap(lambda step: jax.random.split(jax.random.fold_in(own, step), uses))(jnp.arange(steps))


def seed_keys(
    seeds: Sequence[int], attempts: Sequence[int] | None = None, unlearn_seeds: Sequence[int] | None = None
) -> jax.Array:
    """The keys of `seeds`, an array of S keys; of their `attempts` and `unlearn_seeds`, of which 0 is a seed's own."""
    keys = jax.vmap(seed_key)(jnp.array(seeds, jnp.uint32))
    for stream, numbers in ((Stream.ATTEMPT, attempts), (Stream.UNLEARN_SEED, unlearn_seeds)):
        if numbers is not None and any(numbers):
            others = jax.vmap(stream_key, (0, None, 0))(keys, stream, jnp.array(numbers))
            keys = jnp.where(jnp.array(numbers) > 0, others, keys)
    return keys
