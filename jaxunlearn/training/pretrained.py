"""Models for a run; pretrained ones from given weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.devices.sharding import place_seeds
from jaxunlearn.models.network import Network
from jaxunlearn.models.torch_weights import load_weights


class Models(NamedTuple):
    """Models with the seed axis in front, and what training each took."""

    params: Any
    batch_stats: Any
    seconds: list[float]  # a seed's share of the time of the seeds that were trained together
    diverged: list[int | None]  # the first step whose loss, or after which a weight, was not finite
    untrained: list[bool]  # whether it learned nothing and its training was stopped
    attempts: list[int]  # at training it; 0 where it was given


def given(path: Path, network: Network, num_seeds: int, mesh: jax.sharding.Mesh) -> Models:
    """The weights in `path`, for every seed. Raises UserError where they do not fit the network."""
    params, batch_stats = jax.eval_shape(network.initialise, jax.random.key(0))
    variables = load_weights(path, {"params": params, "batch_stats": batch_stats})
    placed = place_seeds(jax.tree.map(lambda x: np.repeat(x[None], num_seeds, 0), variables), mesh)
    return Models(
        placed["params"],
        placed["batch_stats"],
        [0.0] * num_seeds,
        [None] * num_seeds,
        [False] * num_seeds,
        [0] * num_seeds,
    )
