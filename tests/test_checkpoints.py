"""The cache of pretrained models: what a key depends on, round trips, damage."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxunlearn.benchmarks import PRETRAIN_FIELDS, get_benchmark
from jaxunlearn.checkpoints import Saved, load, pretrain_entry, save

PROTOCOL = get_benchmark("resnet20-cifar10-class0")
STATE = {
    "params": {"layer1.0.conv1": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    "count": np.asarray(7, np.int32),
}
ABSTRACT = jax.eval_shape(lambda: STATE)


def entry(folder, protocol=PROTOCOL, digest="d", seed=42, without=None):
    return pretrain_entry(folder, protocol, digest, seed, without)


def test_round_trip_keeps_values_and_removes_older_epochs(tmp_path):
    for epoch in (1, 2):
        save(entry(tmp_path), Saved(jax.tree.map(lambda x, e=epoch: x + e, STATE), epoch, 1.5 * epoch))
    saved = load(entry(tmp_path), ABSTRACT)
    assert (saved.epoch, saved.seconds) == (2, 3.0)
    jax.tree.map(np.testing.assert_array_equal, saved.state, jax.tree.map(lambda x: x + 2, STATE))
    assert [path.name for path in entry(tmp_path).folder.iterdir()] == ["epoch0002"]


def test_nothing_saved_is_none(tmp_path):
    assert load(entry(tmp_path), ABSTRACT) is None


def test_key_depends_on_what_pretraining_reads_and_on_nothing_else(tmp_path):
    other = {int: lambda v: v + 1, float: lambda v: v / 2, str: lambda v: v + "x", bool: lambda v: not v}
    for field in dataclasses.fields(PROTOCOL):
        value = getattr(PROTOCOL, field.name)
        changed = other[type(value)](value) if type(value) in other else 500 if value is None else value[::-1]
        same = entry(tmp_path, dataclasses.replace(PROTOCOL, **{field.name: changed})) == entry(tmp_path)
        assert same == (field.name not in PRETRAIN_FIELDS), field.name
    folders = {
        entry(tmp_path, **change).folder
        for change in ({}, {"digest": "e"}, {"seed": 1}, {"without": 0}, {"without": 1})
    }
    assert len(folders) == 5


@pytest.mark.parametrize("damage", ["truncate", "empty", "shape"])
def test_damaged_checkpoint_is_set_aside_not_used_not_deleted(tmp_path, damage):
    save(entry(tmp_path), Saved(STATE, 3, 1.0))
    abstract = ABSTRACT
    files = [path for path in (entry(tmp_path).folder / "epoch0003").rglob("*") if path.is_file()]
    if damage == "truncate":
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:20])
    elif damage == "empty":
        for path in files:
            path.unlink()
    else:
        abstract = ABSTRACT | {"params": {"layer1.0.conv1": {"kernel": jax.ShapeDtypeStruct((5, 5), np.float32)}}}
    with pytest.warns(UserWarning, match="cannot be read"):
        assert load(entry(tmp_path), abstract) is None
    assert [path.name for path in entry(tmp_path).folder.glob("epoch0003.damaged-*")]
