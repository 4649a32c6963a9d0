"""Whether given weights were made for images of another mean and standard deviation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import BENCHMARKS, Protocol
from jaxunlearn.data.batches import Images
from jaxunlearn.devices.sharding import fetch
from jaxunlearn.models.network import Network

# Of pixels from 0 to 1, one value a channel.
CUSTOMARY = {
    "those of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "one half for both": ((0.5,) * 3, (0.5,) * 3),
    "pixels from 0 to 1": ((0.0,) * 3, (1.0,) * 3),
}
MOST_IMAGES = 256
LOW = 0.8  # accuracy that a trained model of a benchmark exceeds on its training images
MUCH = 0.1  # more of it with another pair


def better_normalisation(
    network: Network, protocol: Protocol, params: Any, batch_stats: Any, train: Images
) -> str | None:
    """A line that names the customary mean and deviation with which a model knows far more of its training images.

    None where it knows enough of them with the protocol's, or too few with all. Computes with 256 images and the first
    seed of `params` and `batch_stats`.
    """
    own = {
        f"those of {protocol.dataset}": (b.mean, b.std) for b in BENCHMARKS.values() if b.dataset == protocol.dataset
    }
    pairs = {"": (protocol.mean, protocol.std), **own, **CUSTOMARY}
    chosen = np.linspace(0, len(train.labels) - 1, min(MOST_IMAGES, len(train.labels))).astype(int)

    @jax.jit
    def accuracies(params: Any, batch_stats: Any, train: Images, pairs: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda x: x[0], (params, batch_stats))
        images, labels = train.images[chosen].astype(jnp.float32) / 255, train.labels[chosen]

        def accuracy(pair: jax.Array) -> jax.Array:
            return (network.apply_eval(*one, (images - pair[0]) / pair[1]).argmax(-1) == labels).mean()

        return jax.lax.map(accuracy, pairs)

    found = accuracies(params, batch_stats, train, jnp.asarray(list(pairs.values()), jnp.float32))
    values = dict(zip(pairs, fetch(found).tolist(), strict=True))
    best = max(values, key=lambda name: values[name])
    if not values[""] < LOW <= values[best] or values[best] < values[""] + MUCH:
        return None
    mean, std = (",".join(f"{value:g}" for value in part) for part in pairs[best])
    return (
        f"the given weights know {values['']:.0%} of training images with the protocol's mean and standard deviation, "
        f"{values[best]:.0%} with {best}: --set protocol.mean={mean} --set protocol.std={std}"
    )
