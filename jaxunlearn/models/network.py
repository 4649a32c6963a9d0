"""A model as pure functions: what steps and rules call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.models import build

PyTree = Any


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
        dtype=jnp.bfloat16 if protocol.precision == "bf16" else jnp.float32,
    )

    def initialise(key: jax.Array) -> tuple[PyTree, PyTree]:
        variables = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)
        return variables["params"], variables["batch_stats"]

    def apply_train(params: PyTree, batch_stats: PyTree, images: jax.Array, key: jax.Array) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return logits, updates["batch_stats"]

    def apply_eval(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        return model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)

    return Network(initialise, apply_train, apply_eval)
