"""Training to the end from wherever a run was stopped: pretraining and unlearning alike."""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxunlearn.devices.processes import anywhere, from_leader, leads
from jaxunlearn.progress import Report, Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.training.checkpoints import Entry, Evaluated, Leaves, Position, Saved, Shapes, load_together, sums_at
from jaxunlearn.training.judging import Judge
from jaxunlearn.training.loop import Keeper, Timing
from jaxunlearn.training.pretrained import Curves
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


class Trained(NamedTuple):
    """States at the end, the seed axis in front, and by seed what came of it."""

    state: Any
    seconds: list[float]  # a seed's share of the time of the seeds that were trained together
    diverged: list[int | None]  # the first step whose loss, or after which a weight, was not finite
    untrained: list[bool]  # whether it had learned nothing when that was looked at, which ended its training
    attempts: list[int]  # how many there were
    curves: list[Curves]  # empty where no metric is known
    prepared: list[float]  # of the seconds, those before the first epoch
    evaluated: list[Evaluated]  # what was found on the way
    devices: list[Sequence[str]]  # the kinds that it was trained on


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
) -> Trained:
    """Brings the entry of every seed, `locked` by the caller, to its last epoch. The states are placed on `mesh`.

    `start(indices)` is for those of `seeds`, each with which of its unlearnings it is, from 0. Seeds that have come
    equally far are trained together. A seed that diverges goes on beside the others, which do not feel it; where all
    have, training ends with the epoch. Where a seed has learned nothing, the others wait until it is drawn again and
    has come as far as they.

    Raises KeyboardInterrupt once it is asked to stop and has saved.
    """
    whole = start(list(range(len(seeds))))
    abstract, judge = cache(whole.training.abstract), redraw.judge if redraw else None

    def shapes(position: Position) -> Shapes:
        return leaves_of(jax.eval_shape(key_data, abstract(position)))

    attempts = _attempts(redraw, len(seeds))
    entries = [redraw.entry(i, attempts[i]) if redraw else entry for i, entry in enumerate(entries)]
    saved = _load(entries, shapes)

    def advance(group: list[int], until: int) -> None:
        training, first_state = whole if len(group) == len(seeds) else start(group)
        with jax.set_mesh(training.mesh):
            before = [one for one in (saved[i] for i in group) if one]
            own, passes = [entries[i] for i in group], training.passes
            keeper = Saving(own, before, passes, training.steps_per_epoch, training.timing, save_every)
            leaves = [one.leaves for one in before]
            state = on_device(leaves, abstract(keeper.position), training.mesh) if before else None
            own_seeds, draws = zip(*(seeds[i] for i in group), strict=True)
            keys = seed_keys(own_seeds, [attempts[i] for i in group], draws)
            given = training, state, first_state, keys, keeper

            def tell(epoch: int) -> None:
                for i, sums in zip(group, keeper.sums, strict=True):
                    own = {name: values[epoch - 1] for name, values in sums.items()}
                    told(i, attempts[i], epoch, {name: x and x / training.steps_per_epoch for name, x in own.items()})

            results = _advance(*given, reporter, title, until, judge, watch, tell, group)
        for i, result in zip(group, results, strict=True):
            saved[i] = result

    advanced = True
    while advanced:
        for i in range(len(seeds)):
            while redraw and redraw.judge.untrained(saved[i]) and attempts[i] + 1 < redraw.most:
                attempts[i] += 1
                if leads():
                    learned = f"{title}: seed {seeds[i][0]} had learned nothing after epoch {redraw.judge.epoch}"
                    warnings.warn(f"{learned}: drawn again, attempt {attempts[i] + 1} of {redraw.most}", stacklevel=2)
                entries[i] = redraw.entry(i, attempts[i])
                saved[i] = _load([entries[i]], shapes)[0]
        until, groups = _next(saved, attempts, judge, whole.training)
        for group in groups:
            advance(group, until)
        advanced = bool(groups)
    done = [one for one in saved if one]
    return Trained(
        on_device([one.leaves for one in done], abstract(Position(whole.training.epochs, 0)), mesh),
        [one.seconds for one in done],
        [one.diverged for one in done],
        [judge is not None and judge.untrained(one) for one in done],
        [attempt + 1 for attempt in attempts],
        [_curves(one, whole.training.steps_per_epoch) for one in done],
        [one.prepared for one in done],
        [one.evaluated for one in done],
        [one.devices for one in done],
    )


def _curves(saved: Saved, steps: int) -> Curves:
    whole = saved.position.epoch
    return {name: [x if x is None else x / steps for x in sums[:whole]] for name, sums in saved.sums.items()}


def _next(
    saved: Sequence[Saved | None], attempts: Sequence[int], judge: Judge | None, training: Training
) -> tuple[int, list[list[int]]]:
    """Until which epoch which seeds are trained next, those together that have come equally far."""
    nowhere = Position(-1 - training.passes, 0)  # to begin also where there is no epoch
    positions = [one.position if one else nowhere for one in saved]
    diverged = [one is not None and one.diverged is not None for one in saved]
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


def _advance(
    training: Training,
    state: Any,
    first_state: Callable[[jax.Array], Any],
    keys: jax.Array,
    keeper: Saving,
    reporter: Reporter,
    title: str,
    until: int,
    judge: Judge | None,
    watch: Watch | None,
    tell: Callable[[int], None],
    group: Sequence[int],
) -> list[Saved]:
    """A group's states after epoch `until`, or after the judge's where one has learned nothing."""
    steps, (epoch, first) = training.steps_per_epoch, keeper.position
    images = training.images_per_epoch * len(keys)
    bar = reporter.task(title, training.epochs, steps, images, epoch * steps + first if epoch >= 0 else 0)
    with bar as report, deferred() as stopping, closing(keeper):
        keeper.stopping = stopping
        state = first_state(keys) if state is None else state
        keeper.enter(keeper.position)

        def look() -> None:
            """Evaluates where that is due after the epochs that are done, and was not before a stop."""
            due = watch and first == 0 and 0 < epoch < training.epochs and epoch % watch.every == 0
            if watch and due and not keeper.knows_worth(epoch):
                keeper.note_worth(epoch, watch.worth(group, epoch, state))

        look()
        while epoch < until and None in keeper.diverged:
            state, metrics = training.epoch(state, keys, epoch, report(epoch), first, keeper)
            keeper.note(metrics)
            epoch, first = epoch + 1, 0
            keeper.enter(Position(epoch, 0))
            if epoch > 0:
                keeper.note_weights(state, epoch * steps - 1)
                tell(epoch)
            if judge and epoch == judge.epoch and any(map(judge.shows, keeper.sums)):
                break
            if keeper.due():  # first, since a stop must not wait for an evaluation
                keeper.keep(0, state, {})
            look()
        keeper.keep(0, state, {})  # writes nothing where that was done just now
        saved = keeper.finish()  # before signals are what they were: one would end the process while the thread writes
        if anywhere(stopping()):
            raise KeyboardInterrupt
        return saved


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
        Saved(_leaves_from_leader(one, shapes(at := Position(*about[0]))), at, *about[1:]) if about else None
        for one, about in zip(own, json.loads(abouts), strict=True)
    ]


def _leaves_from_leader(saved: Saved | None, shapes: Shapes) -> Leaves:
    content = from_leader(b"".join(saved.leaves[name].tobytes() for name in shapes) if saved else b"")
    leaves, place = {}, 0
    for name, x in shapes.items():
        leaves[name] = np.frombuffer(content, x.dtype, x.size, place).reshape(x.shape)
        place += leaves[name].nbytes
    return leaves
