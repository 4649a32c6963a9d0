"""What the package and the PyTorch harness are both given: the same weights and the same batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Batch, normalise, resize
from jaxunlearn.data.datasets import Dataset
from jaxunlearn.models.layers import BATCH_NORM_MOMENTUM
from jaxunlearn.models.network import Network, make_network

BATCH_SIZE = 4  # retain images and forget images a step: float64 is slow, and more would show nothing more
KERNEL_SCALE = 10.0
EVALUATED = 40  # test images of other classes, of the forgotten one, training images of the forgotten one: each


class Case(NamedTuple):
    """What both sides are given, on the host and in f32."""

    protocol: Protocol
    num_classes: int
    steps: int  # of the trajectory
    variables: Any  # {"params", "batch_stats"}
    random_params: Any  # of bad_teacher's incompetent teacher
    batches: list[tuple[Batch, Batch]]  # (retain, forget) of each step, not augmented
    test: Batch
    members: Batch


def make_case(protocol: Protocol, num_classes: int, dataset: Dataset, steps: int) -> Case:
    """Weights, batches and images, the same for each call.

    The weights are initial ones, with two changes. BatchNorm statistics are those of a batch, not 0 and 1. Convolutions
    are `KERNEL_SCALE` times larger, which BatchNorm takes back, so that a step of Adam is so much smaller beside them:
    at their own size (.015 in MobileNetV2's depthwise layers) it is 7% of a weight, and twenty are chaos, in which a
    difference of 1e-14 has become one of 1e-2.
    """
    rng = np.random.default_rng(0)
    train, test = dataset.train, dataset.test

    def take(images: Any, chosen: np.ndarray) -> Batch:
        pixels = resize(jnp.asarray(images.images[chosen]))
        arrays = normalise(pixels, protocol), *jnp.asarray([images.labels[chosen], chosen], jnp.int32)
        return jax.device_get(Batch(*arrays))

    def parts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_forget = labels == protocol.forget_class
        return np.flatnonzero(~is_forget), np.flatnonzero(is_forget)

    draw = [tuple(take(train, rng.choice(p, BATCH_SIZE)) for p in parts(train.labels)) for _ in range(steps + 1)]
    network = without_dropout(make_network(protocol, num_classes))

    def weights(seed: int) -> tuple[Any, Any]:
        params, batch_stats = jax.jit(network.initialise)(jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf * KERNEL_SCALE if leaf.ndim == 4 else leaf, params), batch_stats

    (params, initial), (random_params, _) = weights(0), weights(1)
    images = np.concatenate([batch.images for batch in draw.pop()])
    _, moved = jax.jit(network.apply_train)(params, initial, images, jax.random.key(0))
    # Train mode moves the statistics a tenth of the way; this is all of it.
    keep, move = 1 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM
    batch_stats = jax.tree.map(lambda old, new: (new - keep * old) / move, initial, moved)
    variables = {"params": params, "batch_stats": batch_stats}
    return Case(
        protocol,
        num_classes,
        steps,
        jax.device_get(variables),
        jax.device_get(random_params),
        draw,  # type: ignore[arg-type]
        take(test, np.concatenate([part[:EVALUATED] for part in parts(test.labels)])),
        take(train, parts(train.labels)[1][:EVALUATED]),
    )


def epochs_of(case: Case, precision: str) -> list[int]:
    """The epoch of each step. In fp32 and bf16 one of the last, in which every baseline makes one update; in fp64 the
    trajectory is spread over four, so that scrub goes through both its phases."""
    if precision != "fp64":
        return [case.protocol.unlearn_epochs - 1]
    return [4 * step // case.steps for step in range(case.steps)]


def without_dropout(network: Network) -> Network:
    """Dropout off: its masks are not PyTorch's."""

    def skip(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        return args[0] if isinstance(context.module, nn.Dropout) else call(*args, **kwargs)

    def apply_train(*args: Any) -> Any:
        with nn.intercept_methods(skip):
            return network.apply_train(*args)

    return network._replace(apply_train=apply_train)
