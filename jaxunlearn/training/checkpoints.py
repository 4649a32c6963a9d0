"""What a run keeps to go on from, through Orbax: one entry a model, `<cache>/<kind>/<name>-<key>/epoch<n>[-step<m>]`.

Entries of `pretrained` stay, so that later runs start there; those of `unlearning` go once a run has its records. A
checkpoint appears whole or not at all, and is used only if its content has the digest that was written with it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax import checkpoint as orbax

from jaxunlearn.benchmarks import PRETRAIN_FIELDS, Protocol
from jaxunlearn.devices.processes import anywhere, leads
from jaxunlearn.errors import one_line
from jaxunlearn.files import LOCK_REMEDY, acquire, make_lock, open_many_files, passes, set_aside
from jaxunlearn.registry import Method
from jaxunlearn.training.history import History, Position, Sums

FORMAT = 3  # raise by hand when what a checkpoint means changes: older entries are then never used
DISCARDED = ".discarded"

Leaves = dict[str, np.ndarray]  # by place in the state, such as "params/conv1/kernel"
Shapes = dict[str, jax.ShapeDtypeStruct]


class Saved(NamedTuple):
    """A state as it was saved, without a seed axis."""

    leaves: Leaves
    position: Position
    history: History


class Entry(NamedTuple):
    """Where one seed's model is kept."""

    folder: Path
    about: dict[str, Any]  # JSON values that the key was made of; written beside the state

    @property
    def positions(self) -> set[Position]:
        """Of all its checkpoints."""
        try:
            there = os.listdir(self.folder)
        except FileNotFoundError:  # of a folder that cannot be listed nothing is known: `glob` says that it is empty
            there = []
        names = (re.fullmatch(r"epoch(-?\d{3,})(?:-step(\d{6,}))?", name) for name in there)
        return {Position(int(name[1]), int(name[2] or 0)) for name in names if name}

    def path(self, position: Position) -> Path:
        """Of a checkpoint."""
        return self.folder / position.name


def pretrain_entry(
    cache_dir: Path, protocol: Protocol, digest: str, seed: int, without: int | None = None, attempt: int = 0
) -> Entry:
    """The entry of a model pretrained by `protocol` on the data set with `digest`.

    The key is a hash of what pretraining reads and of nothing else: not the code's version or the device, which would
    throw hours of training away at every commit. `without` is the class left out (`retrain`);
    `attempt` counts from 0.
    """
    fields = _fields(protocol)
    about = {name: fields[name] for name in PRETRAIN_FIELDS if name in fields}
    about |= {"digest": digest, "seed": seed, "without": without}
    about |= {"attempt": attempt} if attempt else {}
    kind, again = "" if without is None else f"-without{without}", f"-attempt{attempt}" if attempt else ""
    return _entry(cache_dir / "pretrained", f"{protocol.model}-{protocol.dataset}{kind}-seed{seed}{again}", about)


def unlearn_entry(
    cache_dir: Path,
    protocol: Protocol,
    digest: str,
    seed: int,
    method: Method,
    attempt: int = 0,
    unlearn_seed: int = 0,
    numbers: Sequence[str] = (),
) -> Entry:
    """The entry of a model that `method` is unlearning. A rule whose file has changed since starts afresh.

    `attempt` is that of the pretrained model, `unlearn_seed` which of its unlearnings this is, both from 0. `numbers`
    are the hyperparameters that the state holds.
    """
    about = _fields(protocol) | {"digest": digest, "seed": seed}
    about |= {"method": method.name, "hyperparameters": method.hyperparameters, "source": method.source}
    about |= {"attempt": attempt} if attempt else {}
    about |= {"unlearn_seed": unlearn_seed} if unlearn_seed else {}
    about |= {"numbers": list(numbers)} if numbers else {}
    again = f"-unlearn{unlearn_seed}" if unlearn_seed else ""
    name = f"{method.name}-{protocol.model}-{protocol.dataset}-seed{seed}{again}"
    return _entry(cache_dir / "unlearning", name, about)


def _fields(protocol: Protocol) -> dict[str, Any]:
    """The protocol's; `validation` came when there were entries, and is left out where it is what they were."""
    return {name: value for name, value in dataclasses.asdict(protocol).items() if name != "validation" or value}


def _entry(parent: Path, name: str, about: dict[str, Any]) -> Entry:
    text = json.dumps(about | {"format": FORMAT}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Entry(parent.absolute() / f"{name}-{key}", json.loads(text))


@contextmanager
def locked(entries: Sequence[Entry]) -> Iterator[None]:
    """Keeps other runs from `entries`; waits, and says so, while one is at them. Ends with the process.

    The leading process does it for its whole run. Raises UserError where the cache is on a file system without locks.
    """
    with ExitStack() as stack:
        open_many_files()  # a lock is one, for as long as it is held
        # In the same order everywhere, or two runs could wait for each other.
        for folder in sorted(entry.folder for entry in entries):
            lock = make_lock(folder.parent.parent / "locks" / f"{folder.name}.lock")
            held = not leads() or acquire(lock, 0, LOCK_REMEDY)
            if not held:
                warnings.warn(f"another process is at {folder.name}: waiting for it to finish", stacklevel=2)
            while anywhere(not held):  # every minute, because no process may wait long for another in silence
                held = held or acquire(lock, 60, LOCK_REMEDY)
            stack.callback(lock.release)
        yield


def load_together(entries: Sequence[Entry], abstract: Callable[[Position], Shapes]) -> list[Saved | None]:
    """What each entry goes on from. `abstract` gives the shapes and dtypes of one state's leaves.

    Seeds that are trained together must go on together, or they would not end as if undisturbed: where a process died
    while it saved some of them, those go back to the newest checkpoint that all have, or to the start where the first
    was being written. Call it while the entries are `locked`.

    A checkpoint that cannot be read is set aside under another name, with a warning, and the one before it is used.
    """
    for entry in entries:
        _clean(entry)
    while True:
        chosen = _choose(entries)
        loaded = [
            None if position is None else load(entry, position, abstract(position))
            for entry, position in zip(entries, chosen, strict=True)
        ]
        if [saved and saved.position for saved in loaded] == chosen:
            for entry, position in zip(entries, chosen, strict=True):
                discard(entry, but=position)
            return loaded


def _choose(entries: Sequence[Entry]) -> list[Position | None]:
    by_name = {entry.folder.name: entry for entry in entries}
    chosen: list[Position | None] = []
    for entry in entries:
        newest = max(entry.positions, default=None)
        names, first = _saved_with(entry, newest)
        group = [entry, *(by_name[name] for name in names if name in by_name)]
        common = set.intersection(*(member.positions for member in group))
        if common:
            newest = max(common)
        elif first and not all(member.folder.exists() for member in group):
            newest = None  # the process died before it had written all of them once
        chosen.append(newest)
    return chosen


def sums_at(entry: Entry, position: Position) -> Sums:
    """Those of a checkpoint that is the entry's newest; empty where it is not or cannot be read, and where an entry
    that was being saved with it is not as far."""
    if max(entry.positions, default=None) != position:
        return {}
    others = (entry._replace(folder=entry.folder.with_name(name)) for name in _saved_with(entry, position)[0])
    if any(max(other.positions, default=position) < position for other in others):
        return {}
    try:
        return (_orbax().metadata(entry.path(position)).custom_metadata or {}).get("sums", {})
    except Exception:  # `load` will say what is wrong with it
        return {}


def _saved_with(entry: Entry, position: Position | None) -> tuple[list[str], bool]:
    """Names of the entries that were being saved with this one, and whether none of them had been before."""
    try:
        about = _orbax().metadata(entry.path(position)).custom_metadata if position else {}
        return about.get("together", []), about.get("first", False)
    except Exception:  # `load` will say what is wrong with it
        return [], False


def load(entry: Entry, position: Position, abstract: Shapes) -> Saved | None:
    """A checkpoint; None, once it is set aside with a warning, where it is not what was written or of another model."""
    path = entry.path(position)
    try:
        metadata = _orbax().metadata(path)
        if {name: (x.shape, x.dtype) for name, x in (metadata.item_metadata or {}).items()} != {
            name: (x.shape, x.dtype) for name, x in abstract.items() if x.size
        }:  # Orbax itself would cut or pad the arrays to fit
            raise ValueError("it is of another model")
        about = metadata.custom_metadata or {}
        leaves = _orbax().restore(path)
        leaves |= {name: np.empty(x.shape, x.dtype) for name, x in abstract.items() if not x.size}
        devices = about.get("devices", [about["device"]] if "device" in about else [])
        known = {name: about[name] for name in History._fields if name in about} | {"devices": tuple(devices)}
        saved = Saved(leaves, position, History(**known))
        if about.get("digest") != _digest(entry, saved):
            raise ValueError("it is not what was written")
        if about.get("precision") == "fp32" and about.get("device", "cpu") != "cpu" and "arithmetic" not in about:
            raise ValueError("it was computed in TF32, before that was said")
        return saved
    except (MemoryError, PermissionError):
        raise  # nothing is wrong with the checkpoint
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own
        if passes(error):
            raise
        aside = set_aside(path)
        warnings.warn(f"checkpoint {path} cannot be used ({one_line(error)}): moved to {aside.name}", stacklevel=2)
        return None


def save_together(entries: Sequence[Entry], saved: Sequence[Saved]) -> None:
    """Writes one state an entry, then removes what those replace. Raises what Orbax does where it cannot."""
    group = {
        "together": [entry.folder.name for entry in entries],
        "first": not any(entry.positions for entry in entries),
    }
    try:
        for entry, one in zip(entries, saved, strict=True):
            written = one.history._asdict() | {"devices": list(one.history.devices), "digest": _digest(entry, one)}
            written |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            written |= {"arithmetic": entry.about["precision"]}  # before, GPUs' fp32 was TF32
            leaves = {name: leaf for name, leaf in one.leaves.items() if leaf.size}  # Orbax refuses empty arrays
            about = entry.about | group | written
            _orbax().save(entry.path(one.position), orbax.args.PyTreeSave(leaves), custom_metadata=about, force=True)
    except BaseException:
        for entry, one in zip(entries, saved, strict=True):  # or a full disk would stay so
            _discard(entry, {one.position} & entry.positions)
            _clean(entry)
        raise
    for entry, one in zip(entries, saved, strict=True):
        discard(entry, but=one.position)


def _orbax() -> orbax.Checkpointer:
    """Orbax's checkpointer for the process that leads: one that is not told so waits for every process of the run.

    The newer interface of Orbax cannot be told: in 0.12.8 its `save` asks all of them where they save.
    """
    alone = orbax.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="leader")
    handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return orbax.Checkpointer(handler, multiprocessing_options=alone)


def discard(entry: Entry, but: Position | None = None) -> None:
    """Removes every checkpoint of an entry `but` one; the entry itself where none is left."""
    _discard(entry, entry.positions - {but})
    _clean(entry)


def _discard(entry: Entry, positions: set[Position]) -> None:
    for position in positions:
        # Renamed first: a process that dies in between must not leave half a checkpoint.
        path = entry.path(position)
        shutil.rmtree(path.rename(path.with_name(path.name + DISCARDED)), ignore_errors=True)


def _clean(entry: Entry) -> None:
    """Removes what a process was writing or removing when it died, and the folder of an entry that has nothing."""
    for path in (*entry.folder.glob(f"*{DISCARDED}"), *entry.folder.glob("*.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)
    if entry.folder.exists() and not any(entry.folder.iterdir()):
        entry.folder.rmdir()


def _digest(entry: Entry, saved: Saved) -> str:
    """SHA-256 of all that a checkpoint means."""
    history = saved.history
    about = [entry.about, saved.position, history.seconds, history.diverged]
    about += [known for known in (history.sums, history.prepared, history.evaluated) if known]  # older ones have none
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, leaf in sorted(saved.leaves.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
