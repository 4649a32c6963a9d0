"""Training to the end from wherever a run was stopped: pretraining and unlearning alike.

Now and then, and when asked to stop, the states of a group of seeds are copied to the host, which is all that the
training waits for, and written from there by a thread of the leading process.
"""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.devices.processes import anywhere, from_leader, leads, meet
from jaxunlearn.devices.sharding import fetch, place_seeds
from jaxunlearn.errors import one_line
from jaxunlearn.progress import Report, Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.training.checkpoints import Entry, Leaves, Position, Saved, load_together, save_together
from jaxunlearn.training.loop import Keeper, Timing
from jaxunlearn.training.stopping import deferred


class Training(Protocol):
    """The training of a group of seeds, epoch by epoch; its state has fields `params` and `batch_stats`."""

    mesh: jax.sharding.Mesh
    timing: Timing
    epochs: int
    steps_per_epoch: int
    images_per_epoch: int

    def abstract(self) -> Any:
        """Shapes and dtypes of one seed's state."""

    def epoch(
        self, state: Any, keys: jax.Array, epoch: int, report: Report, first: int, keeper: Keeper
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """One epoch of all seeds from step `first` on. Returns (state, metrics f32[S, steps from there])."""


class Start(NamedTuple):
    """The training of some of the seeds, and what makes the state before their first step."""

    training: Training
    state: Callable[[], Any]


class Trained(NamedTuple):
    """States at the end, the seed axis in front, and by seed what came of it."""

    state: Any
    seconds: list[float]  # a seed's share of the time of the seeds that were trained together
    diverged: list[int | None]  # the first step whose loss, or after which a weight, was not finite


def train(
    start: Callable[[list[int]], Start],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    mesh: jax.sharding.Mesh,
    reporter: Reporter,
    title: str,
    save_every: float,
) -> Trained:
    """Brings the entry of every seed, `locked` by the caller, to its last epoch. The states are placed on `mesh`.

    `start(indices)` is for those of `seeds`. Seeds that have come equally far are trained together. A seed that
    diverges goes on beside the others, which do not feel it; where all have, training ends with the epoch.

    Raises KeyboardInterrupt once it is asked to stop and has saved.
    """
    whole = start(list(range(len(seeds))))
    abstract = whole.training.abstract()
    shapes = _leaves(jax.eval_shape(_key_data, abstract))
    end = Position(whole.training.epochs, 0)
    saved = _load(entries, shapes)
    by_position: dict[Position, list[int]] = {}
    for i, one in enumerate(saved):
        by_position.setdefault(one.position if one else Position(0, 0), []).append(i)
    for position, group in by_position.items():
        if position == end or all(one and one.diverged is not None for one in (saved[i] for i in group)):
            continue
        training, first_state = whole if len(group) == len(seeds) else start(group)
        with jax.set_mesh(training.mesh):
            before = [one for one in (saved[i] for i in group) if one]
            state = _on_device([one.leaves for one in before], abstract, training.mesh) if before else None
            keeper = Saving([entries[i] for i in group], before, training, save_every)
            keys = seed_keys([seeds[i] for i in group])
            results = _advance(training, state, first_state, keys, keeper, reporter, title)
        for i, result in zip(group, results, strict=True):
            saved[i] = result
    done = [one for one in saved if one]
    state = _on_device([one.leaves for one in done], abstract, mesh)
    return Trained(state, [one.seconds for one in done], [one.diverged for one in done])


def _advance(
    training: Training,
    state: Any,
    first_state: Callable[[], Any],
    keys: jax.Array,
    keeper: "Saving",
    reporter: Reporter,
    title: str,
) -> list[Saved]:
    steps, (epoch, first) = training.steps_per_epoch, keeper.position
    images = training.images_per_epoch * len(keys)
    bar = reporter.task(title, training.epochs, steps, images, epoch * steps + first)
    with bar as report, deferred() as stopping, closing(keeper):
        keeper.stopping = stopping
        state = first_state() if state is None else state
        while epoch < training.epochs and None in keeper.diverged:
            keeper.position = Position(epoch, first)
            state, metrics = training.epoch(state, keys, epoch, report(epoch), first, keeper)
            keeper.note(metrics)
            epoch, first = epoch + 1, 0
            keeper.position = Position(epoch, 0)
            keeper.note_weights(state, epoch * steps - 1)
            if keeper.due():
                keeper.keep(0, state, {})
        keeper.keep(0, state, {})  # writes nothing where that was done just now
        saved = keeper.finish()  # before signals are what they were: one would end the process while the thread writes
        if anywhere(stopping()):
            raise KeyboardInterrupt
        return saved


class Saving:
    """Saves a group of seeds while it trains."""

    def __init__(self, entries: Sequence[Entry], before: Sequence[Saved], training: Training, every: float):
        self.position = before[0].position if before else Position(0, 0)  # where the running epoch was entered
        self.diverged = [one.diverged for one in before] or [None] * len(entries)
        self.stopping: Callable[[], bool] = lambda: False
        self._entries, self._training, self._every = entries, training, every
        self._seconds = [one.seconds for one in before] or [0.0] * len(entries)
        self._start = self._last = time.perf_counter()
        self._not_training = self._overhead()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._submitted: Position | None = None
        self._saved: list[Saved] = []

    def due(self) -> bool:
        """Whether it is time to save: never before what was saved last is written."""
        waited = leads() and time.perf_counter() - self._last >= self._every
        return anywhere(self.stopping() or (waited and (self._writing is None or self._writing.done())))

    def keep(self, done: int, state: Any, metrics: dict[str, np.ndarray]) -> None:
        """Saves the state after `done` steps of the running epoch, of which `metrics` are those since it was entered.

        Raises KeyboardInterrupt, once that is written, where the run was asked to stop.
        """
        self.note(metrics)
        with self._training.timing("checkpoint_s"):
            position = Position(self.position.epoch, done)
            if position != self._submitted:
                self._save(state, position)
            if anywhere(self.stopping()):
                self._wait()
                meet()  # a process that ends takes the others with it
                raise KeyboardInterrupt

    def _save(self, state: Any, position: Position) -> None:
        elapsed = time.perf_counter() - self._start - (self._overhead() - self._not_training)
        states = _to_host(state, len(self._entries))
        self._saved = [
            Saved(_leaves(one), position, seconds + elapsed / len(states), diverged)
            for one, seconds, diverged in zip(states, self._seconds, self.diverged, strict=True)
        ]
        self._wait()
        if leads():
            self._writing = self._thread.submit(save_together, self._entries, self._saved)
        self._last, self._submitted = time.perf_counter(), position

    def note(self, metrics: dict[str, np.ndarray]) -> None:
        """Looks for the first loss that is not finite among those since the running epoch was entered."""
        first = self.position.epoch * self._training.steps_per_epoch + self.position.step
        for i, losses in enumerate(metrics.get("loss", ())):
            wild = np.flatnonzero(~np.isfinite(losses))
            if self.diverged[i] is None and wild.size:
                self.diverged[i] = first + int(wild[0])

    def note_weights(self, state: Any, step: int) -> None:
        """Looks for weights and statistics that are not finite after `step`, the last of an epoch: whatever is saved
        when, the same step is found."""
        finite = fetch(_finite((state.params, state.batch_stats)))
        self.diverged = [
            step if known is None and not fine else known for known, fine in zip(self.diverged, finite, strict=True)
        ]

    def finish(self) -> list[Saved]:
        """What was saved last, once it is written."""
        with self._training.timing("checkpoint_s"):
            self._wait()
        return self._saved

    def close(self) -> None:
        """Waits for the thread: the entries are not to be unlocked while it writes."""
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        if error:  # of a full disk, mostly: no reason to throw the run away
            self._submitted = None
            warnings.warn(f"a checkpoint was not written ({one_line(error)}): the run goes on without", stacklevel=2)

    def _overhead(self) -> float:
        return sum(self._training.timing.get(name, 0.0) for name in ("compile_s", "checkpoint_s"))


def _load(entries: Sequence[Entry], shapes: dict[str, jax.ShapeDtypeStruct]) -> list[Saved | None]:
    """What the cache of the leading process has of each entry, in every process."""
    if jax.process_count() == 1:
        return load_together(entries, shapes)
    own = load_together(entries, shapes) if leads() else [None] * len(entries)
    abouts = from_leader(json.dumps([one and (one.position, one.seconds, one.diverged) for one in own]).encode())
    return [
        Saved(_leaves_from_leader(one, shapes), Position(*about[0]), *about[1:]) if about else None
        for one, about in zip(own, json.loads(abouts), strict=True)
    ]


def _leaves_from_leader(saved: Saved | None, shapes: dict[str, jax.ShapeDtypeStruct]) -> Leaves:
    content = from_leader(b"".join(saved.leaves[name].tobytes() for name in shapes) if saved else b"")
    leaves, place = {}, 0
    for name, x in shapes.items():
        leaves[name] = np.frombuffer(content, x.dtype, x.size, place).reshape(x.shape)
        place += leaves[name].nbytes
    return leaves


@jax.jit
def _finite(tree: Any) -> jax.Array:
    """bool[S]: whether a seed's part of every array is finite."""
    return jnp.stack([jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(tree)]).all(0)


def _leaves(tree: Any) -> dict[str, Any]:
    """Its leaves by place, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _key_data(tree: Any) -> Any:
    """The tree with arrays of numbers in place of its arrays of keys."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(abstract: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), abstract)  # it takes no abstract value
    return found[0]


def _to_host(state: Any, count: int) -> list[Any]:
    """Copies of each seed's state: the buffers behind are donated to the next step."""
    fetched = fetch(_key_data(state))
    return [jax.tree.map(lambda x, i=i: np.array(x[i]), fetched) for i in range(count)]


def _on_device(states: Sequence[Leaves], abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """The states on `mesh`, the seed axis in front."""
    placed: Any = place_seeds({name: np.stack([state[name] for state in states]) for name in states[0]}, mesh)
    leaves = [
        jax.random.wrap_key_data(placed[name], impl=_key_impl(leaf)) if _is_key(leaf) else placed[name]
        for name, leaf in _leaves(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
