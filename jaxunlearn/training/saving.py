"""What is kept of a group of seeds while it trains: now and then, and when it is asked to stop.

The states are copied to the host, which is all that the training waits for, and written from there by a thread of the
leading process.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.devices.processes import anywhere, leads, meet
from jaxunlearn.devices.sharding import fetch
from jaxunlearn.errors import one_line
from jaxunlearn.training.checkpoints import Entry, Saved, save_together
from jaxunlearn.training.history import Evaluated, History, Position, Sums
from jaxunlearn.training.loop import Timing
from jaxunlearn.training.states import leaves_of, to_host


class Saving:
    """Saves a group of seeds while it trains, after so many `passes` in epochs of so many `steps`."""

    def __init__(
        self,
        entries: Sequence[Entry],
        before: Sequence[Saved],
        passes: int,
        steps: int,
        timing: Timing,
        every: float,
    ):
        self.position = before[0].position if before else Position(-passes, 0)  # where the running epoch was entered
        here = jax.devices()[0].device_kind
        known = [one.history for one in before] or [History()] * len(entries)
        self.histories = [own._replace(devices=sorted({*own.devices, here})) for own in known]
        self.stopping: Callable[[], bool] = lambda: False
        self._entries, self._steps, self._timing, self._every = entries, steps, timing, every
        self._entered = [own.sums for own in self.histories]
        self._seconds = [own.seconds for own in self.histories]  # up to where this began
        self._start = self._last = time.perf_counter()
        self._not_training = self._overhead()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._submitted: Position | None = None
        self._saved: list[Saved] = []

    def enter(self, position: Position) -> None:
        """Begins an epoch, or goes on within it."""
        if position == (0, 0):
            known = zip(self.histories, self._spent(), strict=True)
            self.histories = [own._replace(prepared=seconds) for own, seconds in known]
        self.position, self._entered = position, [own.sums for own in self.histories]

    def due(self) -> bool:
        """Whether it is time to save: never before what was saved last is written."""
        waited = leads() and time.perf_counter() - self._last >= self._every
        return anywhere(self.stopping() or (waited and (self._writing is None or self._writing.done())))

    def keep(self, done: int, state: Any, metrics: dict[str, np.ndarray]) -> None:
        """Saves the state after `done` steps of the running epoch, of which `metrics` are those since it was entered.

        Raises KeyboardInterrupt, once that is written, where the run was asked to stop.
        """
        self.note(metrics)
        with self._timing("checkpoint_s"):
            position = Position(self.position.epoch, done)
            if position != self._submitted:
                self._save(state, position)
            if anywhere(self.stopping()):
                self._wait()
                meet()  # a process that ends takes the others with it
                raise KeyboardInterrupt

    def _save(self, state: Any, position: Position) -> None:
        known = zip(self.histories, self._spent(), to_host(state, len(self._entries)), strict=True)
        self._saved = [Saved(leaves_of(one), position, own._replace(seconds=spent)) for own, spent, one in known]
        self._wait()
        if leads():
            self._writing = self._thread.submit(save_together, self._entries, self._saved)
        self._last, self._submitted = time.perf_counter(), position

    def _spent(self) -> list[float]:
        """Seconds of training up to now, by seed."""
        elapsed = time.perf_counter() - self._start - (self._overhead() - self._not_training)
        return [seconds + elapsed / len(self._entries) for seconds in self._seconds]

    def note(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds up the metrics since the running epoch was entered, and looks for the first loss that is not finite."""
        if not metrics:
            return
        each = [{name: values[i] for name, values in metrics.items()} for i in range(len(self._entries))]
        known = zip(self.histories, self._entered, each, strict=True)
        self.histories = [own._replace(sums=_added(sums, new, self.position)) for own, sums, new in known]
        first = self.position.epoch * self._steps + self.position.step
        wild = ~np.isfinite(metrics["loss"])
        self._note_diverged(first + int(own.argmax()) if own.any() else None for own in wild)

    def note_weights(self, state: Any, step: int) -> None:
        """Looks for weights and statistics that are not finite after `step`, the last of an epoch: whatever is saved
        when, the same step is found."""
        finite = fetch(_finite((state.params, state.batch_stats)))
        self._note_diverged(None if fine else step for fine in finite)

    def _note_diverged(self, steps: Iterable[int | None]) -> None:
        known = zip(self.histories, steps, strict=True)
        self.histories = [own._replace(diverged=step) if own.diverged is None else own for own, step in known]

    def knows_worth(self, epoch: int) -> bool:
        """Whether it was noted what each model is worth after so many epochs."""
        return all(epoch in own.evaluated.get("epoch", ()) for own in self.histories)

    def note_worth(self, epoch: int, worth: Sequence[Mapping[str, float | None]]) -> None:
        """Adds what each model is worth after so many epochs: nothing can be said of one that has diverged."""
        known = zip(self.histories, worth, strict=True)
        self.histories = [own._replace(evaluated=_evaluated(own, epoch, new)) for own, new in known]
        self._submitted = None  # what was saved last does not know it

    def finish(self) -> list[Saved]:
        """What was saved last, once it is written."""
        with self._timing("checkpoint_s"):
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
        return sum(self._timing.get(name, 0.0) for name in ("compile_s", "checkpoint_s", "evaluate_s"))


def _evaluated(history: History, epoch: int, worth: Mapping[str, float | None]) -> Evaluated:
    """What a history knows of the epochs up to this one, once each."""
    known = history.evaluated
    if epoch in known.get("epoch", ()):
        return known
    said = {"epoch": epoch} | {name: value if history.diverged is None else None for name, value in worth.items()}
    return {name: [*known.get(name, []), value] for name, value in said.items()}


def _added(sums: Sums, metrics: Mapping[str, np.ndarray], entered: Position) -> Sums:
    """The sums with what the steps since a position add, one by one: wherever an epoch was cut, the same bits."""
    result = dict(sums)
    for name, values in metrics.items():
        known = sums.get(name, [])
        own = [*known, *[None] * (entered.epoch - len(known))]
        total: float | None = None if entered.step else 0.0
        if len(own) > entered.epoch:
            total = own.pop()
        for value in values.tolist():
            total = None if total is None else total + value
        result[name] = [*own, total if total is not None and math.isfinite(total) else None]
    return result


@jax.jit
def _finite(tree: Any) -> jax.Array:
    """bool[S]: whether a seed's part of every array is finite."""
    return jnp.stack([jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(tree)]).all(0)
