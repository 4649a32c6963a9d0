"""Models for a run; pretrained ones from given weights."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.devices.sharding import place_seeds
from jaxunlearn.models.network import Network
from jaxunlearn.models.state_dicts import normalisation
from jaxunlearn.models.torch_weights import fit_weights
from jaxunlearn.models.weight_files import read_weights
from jaxunlearn.training.checkpoints import Evaluated

Curves = dict[str, list[float | None]]  # of a metric, its mean over the steps of each whole epoch; None: not known


class Models(NamedTuple):
    """Models with the seed axis in front, and what training each took."""

    params: Any
    batch_stats: Any
    seconds: list[float]  # a seed's share of the time of the seeds that were trained together
    diverged: list[int | None]  # the first step whose loss, or after which a weight, was not finite
    untrained: list[bool]  # whether it learned nothing and its training was stopped
    attempts: list[int]  # at training it; 0 where it was given
    curves: list[Curves]  # of its training; empty where no metric is known, as of a model that was given
    prepared: list[float]  # of the seconds, those before the first epoch
    evaluated: list[Evaluated]  # what each was worth on the way; empty where nobody asked
    devices: list[Sequence[str]]  # the kinds that each was trained on; none where it was given, or nobody knows


def repeated(models: Models, times: int, mesh: jax.sharding.Mesh) -> Models:
    """All the models so many times in a row, as if nothing had been done to them since."""
    count = len(models.seconds) * times
    params, batch_stats = place_seeds(jax.tree.map(lambda x: jnp.concatenate([x] * times), models[:2]), mesh)
    return Models(
        params,
        batch_stats,
        [0.0] * count,
        models.diverged * times,
        models.untrained * times,
        models.attempts * times,
        [{}] * count,
        [0.0] * count,
        [{}] * count,
        [()] * count,
    )


def given(path: Path, protocol: Protocol, network: Network, num_seeds: int, mesh: jax.sharding.Mesh) -> Models:
    """The weights in `path`, for every seed. Raises UserError where they do not fit the network.

    Warns where they were made for images of another mean and standard deviation than the protocol's, and the file says
    so.
    """
    params, batch_stats = jax.eval_shape(network.initialise, jax.random.key(0))
    arrays = read_weights(path)
    variables = fit_weights(path, arrays, {"params": params, "batch_stats": batch_stats})
    theirs, ours = normalisation(arrays), (protocol.mean, protocol.std)
    if theirs is not None and not np.allclose(theirs, ours, rtol=0, atol=1e-3):
        mean, std = (",".join(f"{value:.4g}" for value in values) for values in theirs)
        warnings.warn(
            f"{path}: the weights are for images of another mean and standard deviation than the protocol's: "
            f"--set protocol.mean={mean} --set protocol.std={std}",
            stacklevel=2,
        )
    placed = place_seeds(jax.tree.map(lambda x: np.repeat(x[None], num_seeds, 0), variables), mesh)
    return Models(
        placed["params"],
        placed["batch_stats"],
        [0.0] * num_seeds,
        [None] * num_seeds,
        [False] * num_seeds,
        [0] * num_seeds,
        [{}] * num_seeds,
        [0.0] * num_seeds,
        [{}] * num_seeds,
        [()] * num_seeds,
    )
