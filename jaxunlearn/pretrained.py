"""Pretrained models for a run: from given weights, or from the cache, trained on from where an earlier call stopped."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.checkpoints import Entry, Saved, load, save
from jaxunlearn.models.network import Network
from jaxunlearn.models.torch_weights import load_weights
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.sharding import place_seeds
from jaxunlearn.training import Pretraining


class Models(NamedTuple):
    """Models with the seed axis in front, and what training each took."""

    params: Any
    batch_stats: Any
    seconds: list[float]  # a seed's share of the time of the seeds that were trained together


def given(path: Path, network: Network, num_seeds: int, mesh: jax.sharding.Mesh) -> Models:
    """The weights in `path`, for every seed. Raises UserError where they do not fit the network."""
    params, batch_stats = jax.eval_shape(network.initialise, jax.random.key(0))
    variables = load_weights(path, {"params": params, "batch_stats": batch_stats})
    placed = place_seeds(jax.tree.map(lambda x: jnp.repeat(x[None], num_seeds, 0), variables), mesh)
    return Models(placed["params"], placed["batch_stats"], [0.0] * num_seeds)


def train_or_load(
    make_pretraining: Callable[[int], Pretraining],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    mesh: jax.sharding.Mesh,
    reporter: Reporter,
    title: str,
) -> Models:
    """Brings the cache entry of every seed to its last epoch and returns the models, placed on `mesh`.

    `make_pretraining(n)` makes the pretraining of n seeds. Seeds that have come equally far are trained together.
    """
    first = make_pretraining(len(seeds))
    abstract = first.abstract()
    saved = [load(entry, abstract) for entry in entries]
    for epoch in sorted({s.epoch if s else 0 for s in saved} - {first.epochs}, reverse=True):
        group = [i for i, s in enumerate(saved) if (s.epoch if s else 0) == epoch]
        pretraining = first if len(group) == len(seeds) else make_pretraining(len(group))
        with jax.set_mesh(pretraining.mesh):
            trained = _train(
                pretraining,
                [entries[i] for i in group],
                [seeds[i] for i in group],
                [saved[i] for i in group],
                reporter,
                title,
            )
        for i, result in zip(group, trained, strict=True):
            saved[i] = result
    done = [s for s in saved if s is not None]
    state = place_seeds(_stack([s.state for s in done]), mesh)
    return Models(state.params, state.batch_stats, [s.seconds for s in done])


def _train(
    pretraining: Pretraining,
    entries: Sequence[Entry],
    seeds: Sequence[int],
    saved: Sequence[Saved | None],
    reporter: Reporter,
    title: str,
) -> list[Saved]:
    """Trains seeds that are equally far, saving each epoch."""
    keys = seed_keys(seeds)
    resumed = [s for s in saved if s is not None]
    first = resumed[0].epoch if resumed else 0
    seconds = [s.seconds for s in resumed] or [0.0] * len(seeds)
    state = place_seeds(_stack([s.state for s in resumed]), pretraining.mesh) if resumed else pretraining.start(keys)
    results: list[Saved] = []
    bar = reporter.task(
        title, pretraining.epochs, pretraining.steps_per_epoch, pretraining.images_per_epoch * len(seeds), first
    )
    with bar as report:
        for epoch in range(first, pretraining.epochs):
            start, compiled = time.perf_counter(), pretraining.compile_seconds
            state, _ = pretraining.epoch(state, keys, epoch, report(epoch))
            elapsed = time.perf_counter() - start - (pretraining.compile_seconds - compiled)
            seconds = [s + elapsed / len(seeds) for s in seconds]
            fetched = jax.device_get(state)
            results = [
                Saved(jax.tree.map(lambda x, i=i: np.asarray(x[i]), fetched), epoch + 1, s)
                for i, s in enumerate(seconds)
            ]
            for entry, result in zip(entries, results, strict=True):
                save(entry, result)
    return results


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
