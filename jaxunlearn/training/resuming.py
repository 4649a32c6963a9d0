"""Training to the end from wherever a run was stopped: pretraining and unlearning alike."""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxunlearn.devices.processes import anywhere, from_leader, leads
from jaxunlearn.progress import Report, Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.training.checkpoints import Entry, Leaves, Saved, Shapes, load_together, sums_at
from jaxunlearn.training.history import Curves, History, Outcome, Position
from jaxunlearn.training.judging import Judge
from jaxunlearn.training.loop import Keeper, Timing
from jaxunlearn.training.saving import Saving
from jaxunlearn.training.states import key_data, leaves_of, on_device
from jaxunlearn.training.stopping import deferred


class Training(Protocol):
    """The training of a group of seeds, epoch by epoch; its state has fields `params` and `batch_stats`. What it passes
    over before its first epoch are the epochs below 0."""

    mesh: jax.sharding.Mesh
    timing: Timing
    passes: int
    epochs: int
    steps_per_epoch: int
    images_per_epoch: int

    def abstract(self, position: Position) -> Any:
        """Shapes and dtypes of one seed's state at a position."""

    def epoch(
        self, state: Any, keys: jax.Array, epoch: int, report: Report, first: int, keeper: Keeper
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """One epoch of all seeds from step `first` on. Returns (state, metrics f32[S, steps from there], or none)."""


class Start(NamedTuple):
    """The training of some of the seeds, and what makes the state before their first step from keys[S]."""

    training: Training
    state: Callable[[jax.Array], Any]


class Redraw(NamedTuple):
    """What is done about a seed that has learned nothing: it is drawn again, up to `most` attempts in all."""

    judge: Judge
    most: int
    entry: Callable[[int, int], Entry]  # of one of the seeds, by its attempt, from 0


class Watch(NamedTuple):
    """What looks at models on the way: after `every` epochs, but not after the last. It changes nothing."""

    every: int
    worth: Callable[[Sequence[int], int, Any], list[dict[str, float | None]]]  # of these seeds, after an epoch, state


# Told (which of the seeds, its attempt from 0, after how many epochs, each metric's mean over the last one's steps).
Told = Callable[[int, int, int, dict[str, float | None]], None]


def train(
    start: Callable[[list[int]], Start],
    entries: Sequence[Entry],
    seeds: Sequence[tuple[int, int]],
    mesh: jax.sharding.Mesh,
    reporter: Reporter,
    title: str,
    save_every: float,
    redraw: Redraw | None = None,
    watch: Watch | None = None,
    told: Told = lambda *_: None,
) -> tuple[Any, list[Outcome]]:
    """Brings the entry of every seed, `locked` by the caller, to its last epoch. Returns (states at the end, the seed
    axis in front, placed on `mesh`, what came of each).

    `start(indices)` is for those of `seeds`, each with which of its unlearnings it is, from 0. Seeds that have come
    equally far are trained together. A seed that diverges goes on beside the others, which do not feel it; where all
    have, training ends with the epoch. Where a seed has learned nothing, the others wait until it is drawn again and
    has come as far as they.

    Raises KeyboardInterrupt once it is asked to stop and has saved.
    """
    run = _Run(start, list(entries), seeds, reporter, title, save_every, redraw, watch, told)
    while run.advance():
        pass
    return run.states(mesh), run.outcomes()


@dataclass
class _Run:
    """Seeds on their way to the last epoch: what `train` was given, and how far each of them is."""

    start: Callable[[list[int]], Start]
    entries: list[Entry]  # of the attempts that they have come to
    seeds: Sequence[tuple[int, int]]
    reporter: Reporter
    title: str
    save_every: float
    redraw: Redraw | None
    watch: Watch | None
    told: Told

    def __post_init__(self) -> None:
        self.whole = self.start(list(range(len(self.seeds))))
        self.steps, self.epochs = self.whole.training.steps_per_epoch, self.whole.training.epochs
        self.abstract, self.judge = cache(self.whole.training.abstract), self.redraw.judge if self.redraw else None
        self.attempts = _attempts(self.redraw, len(self.seeds))
        if self.redraw:
            self.entries = [self.redraw.entry(i, attempt) for i, attempt in enumerate(self.attempts)]
        self.saved = _load(self.entries, self.shapes)

    def advance(self) -> bool:
        """Trains those that are behind until they are as far as the others, or else all to the end.

        Returns whether there was anything to train.
        """
        for i in range(len(self.seeds)):
            self.draw_again(i)
        until, groups = _next(self.saved, self.attempts, self.judge, self.whole.training)
        for group in groups:
            for i, one in zip(group, self.train(group, until), strict=True):
                self.saved[i] = one
        return bool(groups)

    def states(self, mesh: jax.sharding.Mesh) -> Any:
        """Those after the last epoch, the seed axis in front."""
        last = Position(self.epochs, 0)
        return on_device([one.leaves for one in self.saved if one], self.abstract(last), mesh)

    def outcomes(self) -> list[Outcome]:
        """What came of each seed."""
        found = []
        for one, attempt in zip(self.saved, self.attempts, strict=True):
            if one:
                known = one.history._asdict()
                del known["sums"]
                untrained = self.judge is not None and self.judge.untrained(one)
                curves = _curves(one, self.steps)
                found.append(Outcome(**known, curves=curves, untrained=untrained, attempts=attempt + 1))
        return found

    def shapes(self, position: Position) -> Shapes:
        return leaves_of(jax.eval_shape(key_data, self.abstract(position)))

    def draw_again(self, i: int) -> None:
        """Puts another attempt in the place of one that has learned nothing, while there is another."""
        redraw = self.redraw
        while redraw and redraw.judge.untrained(self.saved[i]) and self.attempts[i] + 1 < redraw.most:
            self.attempts[i] += 1
            if leads():
                seed, epoch = self.seeds[i][0], redraw.judge.epoch
                again = f"drawn again, attempt {self.attempts[i] + 1} of {redraw.most}"
                learned = f"seed {seed} had learned nothing after epoch {epoch}"
                warnings.warn(f"{self.title}: {learned}: {again}", stacklevel=2)
            self.entries[i] = redraw.entry(i, self.attempts[i])
            self.saved[i] = _load([self.entries[i]], self.shapes)[0]

    def train(self, group: list[int], until: int) -> list[Saved]:
        """A group's states after epoch `until`, or after the judge's where one has learned nothing."""
        training, first_state = self.whole if len(group) == len(self.seeds) else self.start(group)
        entries, before = [self.entries[i] for i in group], [one for one in (self.saved[i] for i in group) if one]
        keeper = Saving(entries, before, training.passes, self.steps, training.timing, self.save_every)
        epoch, first = keeper.position
        done = epoch * self.steps + first if epoch >= 0 else 0
        images = training.images_per_epoch * len(group)
        bar = self.reporter.task(self.title, self.epochs, self.steps, images, done)
        with jax.set_mesh(training.mesh), bar as report, deferred() as stopping, closing(keeper):
            keeper.stopping = stopping
            seeds, draws = zip(*(self.seeds[i] for i in group), strict=True)
            keys = seed_keys(seeds, [self.attempts[i] for i in group], draws)
            leaves = [one.leaves for one in before]
            state = on_device(leaves, self.abstract(keeper.position), training.mesh) if before else first_state(keys)
            keeper.enter(keeper.position)
            self.look(group, keeper, state)
            while epoch < until and any(own.diverged is None for own in keeper.histories):
                state, metrics = training.epoch(state, keys, epoch, report(epoch), first, keeper)
                keeper.note(metrics)
                epoch, first = epoch + 1, 0
                keeper.enter(Position(epoch, 0))
                if epoch > 0:
                    keeper.note_weights(state, epoch * self.steps - 1)
                    self.tell(group, keeper)
                judge = self.judge
                if judge and epoch == judge.epoch and any(judge.shows(own.sums) for own in keeper.histories):
                    break
                if keeper.due():  # first, since a stop must not wait for an evaluation
                    keeper.keep(0, state, {})
                self.look(group, keeper, state)
            keeper.keep(0, state, {})  # writes nothing where that was done just now
            # Before signals are what they were: one would end the process while the thread writes.
            saved = keeper.finish()
            if anywhere(stopping()):
                raise KeyboardInterrupt
            return saved

    def tell(self, group: Sequence[int], keeper: Saving) -> None:
        """Tells what the epoch that has just ended was like."""
        epoch = keeper.position.epoch
        for i, own in zip(group, keeper.histories, strict=True):
            last = {name: values[epoch - 1] for name, values in own.sums.items()}
            self.told(i, self.attempts[i], epoch, {name: x and x / self.steps for name, x in last.items()})

    def look(self, group: Sequence[int], keeper: Saving, state: Any) -> None:
        """Evaluates where that is due after the epochs that are done, and was not before a stop."""
        watch, (epoch, step) = self.watch, keeper.position
        within = step == 0 and 0 < epoch < self.epochs
        if watch and within and epoch % watch.every == 0 and not keeper.knows_worth(epoch):
            keeper.note_worth(epoch, watch.worth(group, epoch, state))


def _curves(saved: Saved, steps: int) -> Curves:
    whole = saved.position.epoch
    return {name: [x if x is None else x / steps for x in sums[:whole]] for name, sums in saved.history.sums.items()}


def _next(
    saved: Sequence[Saved | None], attempts: Sequence[int], judge: Judge | None, training: Training
) -> tuple[int, list[list[int]]]:
    """Until which epoch which seeds are trained next, those together that have come equally far."""
    nowhere = Position(-1 - training.passes, 0)  # to begin also where there is no epoch
    positions = [one.position if one else nowhere for one in saved]
    diverged = [one is not None and one.history.diverged is not None for one in saved]
    to_go = [i for i in range(len(saved)) if not (judge and judge.untrained(saved[i]))]
    # Those that were drawn again, or fell behind, first come as far as the others, to go on together with them.
    waiting = any(judge and positions[i] == (judge.epoch, 0) for i in to_go)
    late = [
        i for i in to_go if judge and (attempts[i] or waiting) and positions[i].epoch < judge.epoch and not diverged[i]
    ]
    until = judge.epoch if judge and late else training.epochs
    groups: dict[Position, list[int]] = {}
    for i in late or to_go:
        groups.setdefault(positions[i], []).append(i)
    return until, [
        group for where, group in groups.items() if where.epoch < until and not all(diverged[i] for i in group)
    ]


def _attempts(redraw: Redraw | None, count: int) -> list[int]:
    """Which attempt each seed has come to: the first that was not found to have learned nothing, or the last."""
    if redraw is None:
        return [0] * count
    attempts = [0] * count
    for i in range(count if leads() else 0):
        judged = Position(redraw.judge.epoch, 0)
        while attempts[i] + 1 < redraw.most and redraw.judge.shows(sums_at(redraw.entry(i, attempts[i]), judged)):
            attempts[i] += 1
    return json.loads(from_leader(json.dumps(attempts).encode()))  # type: ignore[no-any-return]


def _load(entries: Sequence[Entry], shapes: Callable[[Position], Shapes]) -> list[Saved | None]:
    """What the cache of the leading process has of each entry, in every process."""
    if jax.process_count() == 1:
        return load_together(entries, shapes)
    own = load_together(entries, shapes) if leads() else [None] * len(entries)
    abouts = from_leader(
        json.dumps([one and one[1:] for one in own]).encode()  # all but the leaves
    )
    return [
        Saved(_leaves_from_leader(one, shapes(at := Position(*about[0]))), at, History(*about[1])) if about else None
        for one, about in zip(own, json.loads(abouts), strict=True)
    ]


def _leaves_from_leader(saved: Saved | None, shapes: Shapes) -> Leaves:
    content = from_leader(b"".join(saved.leaves[name].tobytes() for name in shapes) if saved else b"")
    leaves, place = {}, 0
    for name, x in shapes.items():
        leaves[name] = np.frombuffer(content, x.dtype, x.size, place).reshape(x.shape)
        place += leaves[name].nbytes
    return leaves
