"""A model as pure functions: what steps and rules call."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.models import build
from jaxunlearn.models.initialisation import initial_variables

PyTree = Any

# Of the computation. What tells tf32 from fp32 is `devices.configuration.computing`; a CPU has no tf32. "fp64" is for
# comparisons (with x64 enabled), not for the command line.
DTYPES = {"fp32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16, "fp64": jnp.float64}


class Network(NamedTuple):
    """A model's functions, for one seed. Images are f32[B, 32, 32, 3], logits f32[B, classes]."""

    initialise: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, batch_stats)
    apply_train: Callable[..., tuple[jax.Array, PyTree]]  # (params, batch_stats, images, key) -> (logits, batch_stats)
    apply_eval: Callable[..., jax.Array]  # (params, batch_stats, images) -> logits


def make_network(protocol: Protocol, num_classes: int) -> Network:
    """The network that `protocol` names."""
    model = build(
        protocol.model,
        num_classes,
        resnet_shortcut=protocol.resnet_shortcut,
        mobilenet_stride=protocol.mobilenet_stride,
        mobilenet_dropout=protocol.mobilenet_dropout,
        dtype=DTYPES[protocol.precision],
    )

    def initialise(key: jax.Array) -> tuple[PyTree, PyTree]:
        shapes = jax.eval_shape(partial(model.init, train=False), key, jnp.zeros((1, 32, 32, 3)))
        variables = initial_variables(shapes, key)
        return variables["params"], variables["batch_stats"]

    def apply_train(params: PyTree, batch_stats: PyTree, images: jax.Array, key: jax.Array) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return logits, updates["batch_stats"]

    def apply_eval(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
        return logits

    return Network(initialise, apply_train, apply_eval)
