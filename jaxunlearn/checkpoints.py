"""The cache of pretrained models: one entry a seed, written after every epoch, through Orbax.

`<cache>/pretrained/<model>-<dataset>-seed<k>-<key>/epoch<n>` is the state after n epochs; the same command goes on
from it, and once n is the protocol's last epoch every later run starts there. A new epoch is written whole before the
one it replaces goes.
"""

import dataclasses
import hashlib
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxunlearn.benchmarks import PRETRAIN_FIELDS, Protocol
from jaxunlearn.errors import one_line

FORMAT = 1  # raise by hand when what a checkpoint means changes: older entries are then never used


class Saved(NamedTuple):
    """A state as it was saved: numpy leaves, without a seed axis."""

    state: Any
    epoch: int  # epochs done
    seconds: float  # that all of them took


class Entry(NamedTuple):
    """Where one seed's pretrained model is kept."""

    folder: Path
    about: dict[str, Any]  # what the key was made of; written beside the state for people to read


def pretrain_entry(cache_dir: Path, protocol: Protocol, digest: str, seed: int, without: int | None = None) -> Entry:
    """The entry of a model pretrained by `protocol` on the data set with `digest`.

    The key is a hash of what pretraining reads and of nothing else: not the code's version or the device, which would
    throw hours of training away at every commit. `without` is the class left out (`retrain`).
    """
    fields = dataclasses.asdict(protocol)
    about = {name: fields[name] for name in PRETRAIN_FIELDS}
    about |= {"digest": digest, "seed": seed, "without": without, "format": FORMAT}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    kind = "" if without is None else f"-without{without}"
    name = f"{protocol.model}-{protocol.dataset}{kind}-seed{seed}-{key}"
    return Entry(cache_dir.absolute() / "pretrained" / name, about)


def load(entry: Entry, abstract: Any) -> Saved | None:
    """The newest saved state of `entry`, or None. `abstract` gives its structure, shapes and dtypes.

    A checkpoint that cannot be read is set aside under another name, with a warning, and the one before it is used.
    """
    for path in sorted(entry.folder.glob("epoch[0-9][0-9][0-9][0-9]"), reverse=True):
        try:
            empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)
            metadata = ocp.metadata(path)
            if _shapes(metadata.metadata) != _shapes(abstract):  # Orbax itself would cut or pad the arrays to fit
                raise ValueError("it is of another model")
            seconds = float(metadata.custom_metadata["seconds"])
            return Saved(ocp.load(path, empty), int(path.name.removeprefix("epoch")), seconds)
        except (MemoryError, PermissionError):
            raise  # nothing is wrong with the checkpoint
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            path.rename(aside)
            warnings.warn(f"checkpoint {path} cannot be read ({one_line(error)}): moved to {aside.name}", stacklevel=2)
    return None


def _shapes(tree: Any) -> set[tuple[Any, ...]]:
    """Every leaf's place, shape and dtype; a named tuple's field counts as a dict's key, as in Orbax's metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(jax.tree_util.keystr(path, simple=True, separator="/"), *x.shape, str(x.dtype)) for path, x in leaves}


def save(entry: Entry, saved: Saved) -> None:
    """Writes `saved` and removes the epochs before it."""
    leaves = jax.tree.map(np.asarray, saved.state)
    path = entry.folder / f"epoch{saved.epoch:04d}"
    metadata = {"seconds": saved.seconds, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    ocp.save(path, leaves, custom_metadata=entry.about | metadata, overwrite=True)
    for older in entry.folder.glob("epoch[0-9][0-9][0-9][0-9]"):
        if older.name < path.name:
            shutil.rmtree(older, ignore_errors=True)  # another process may be at it too
