"""A model as pure functions: what steps and rules call."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.models import build
from jaxunlearn.models.initialisation import initial_variables
from jaxunlearn.models.layers import BatchNorm, Linear

PyTree = Any

# Of the computation. What tells tf32 from fp32 is `devices.configuration.computing`; a CPU has no tf32. "fp64" is for
# comparisons (with x64 enabled), not for the command line.
DTYPES = {"fp32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16, "fp64": jnp.float64}


class Network(NamedTuple):
    """A model's functions, for one seed. Images are f32[B, 32, 32, 3], logits f32[B, classes]."""

    initialise: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, batch_stats)
    apply_train: Callable[..., tuple[jax.Array, PyTree]]  # (params, batch_stats, images, key) -> (logits, batch_stats)
    apply_eval: Callable[..., jax.Array]  # (params, batch_stats, images) -> logits
    forward: Callable[..., "Forward"]  # (params, batch_stats, images, key, train, batch_norm) -> Forward
    layers: Callable[[], tuple[str, ...]]  # names of the layers with parameters, in the order in which they compute


class Forward(NamedTuple):
    """What `Network.forward` returns, in train or eval mode; without `batch_norm` BatchNorm alone is in eval mode."""

    logits: jax.Array
    features: jax.Array  # f32[B, width]: what the last linear layer is given
    batch_stats: PyTree


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

    def forward(
        params: PyTree, batch_stats: PyTree, images: jax.Array, key: jax.Array, train: bool, batch_norm: bool
    ) -> Forward:
        features = []

        def watch(layer: Callable[..., Any], inputs: Any, options: Any, context: Any) -> Any:
            if isinstance(context.module, Linear):
                features.append(inputs[0])
            if isinstance(context.module, BatchNorm):
                inputs = (inputs[0], train and batch_norm)
            return layer(*inputs, **options)

        variables = {"params": params, "batch_stats": batch_stats}
        with nn.intercept_methods(watch):
            logits, after = model.apply(variables, images, train=train, mutable=["batch_stats"], rngs={"dropout": key})
        return Forward(logits, features[-1], after["batch_stats"])

    def layers() -> tuple[str, ...]:
        names: list[str] = []

        def trace() -> None:  # all of it inside: what leaves is sorted, and what is made outside joins a step's trace
            variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
            names.extend(variables["params"])

        jax.eval_shape(trace)
        return tuple(names)

    return Network(initialise, apply_train, apply_eval, forward, layers)
