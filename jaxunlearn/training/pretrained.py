"""Models for a run; pretrained ones from given weights."""

import warnings
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
from jaxunlearn.randomness import abstract_key
from jaxunlearn.training.history import Outcome


class Models(NamedTuple):
    """Models with the seed axis in front, and what came of training each."""

    params: Any
    batch_stats: Any
    outcomes: list[Outcome]


def repeated(models: Models, times: int, mesh: jax.sharding.Mesh) -> Models:
    """All the models so many times in a row, as if nothing had been done to them since."""
    params, batch_stats = place_seeds(jax.tree.map(lambda x: jnp.concatenate([x] * times), models[:2]), mesh)
    kept = [Outcome(diverged=own.diverged, untrained=own.untrained, attempts=own.attempts) for own in models.outcomes]
    return Models(params, batch_stats, kept * times)


def given(path: Path, protocol: Protocol, network: Network, num_seeds: int, mesh: jax.sharding.Mesh) -> Models:
    """The weights in `path`, for every seed. Raises UserError where they do not fit the network.

    Warns where they were made for images of another mean and standard deviation than the protocol's, and the file says
    so.
    """
    params, batch_stats = jax.eval_shape(network.initialise, abstract_key())
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
    return Models(placed["params"], placed["batch_stats"], [Outcome()] * num_seeds)
