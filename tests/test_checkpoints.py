"""The cache of models: what a key depends on, round trips, damage, what a group of seeds goes on from."""

import dataclasses
import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import Checkpointer

from jaxunlearn.benchmarks import PRETRAIN_FIELDS, get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.registry import Method, get_method
from jaxunlearn.training import checkpoints
from jaxunlearn.training.checkpoints import (
    Saved,
    discard,
    load_together,
    locked,
    pretrain_entry,
    save_together,
)
from jaxunlearn.training.history import History, Position

# Orbax reads the arrays of a checkpoint at once; where one fails, the others come back to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")

PROTOCOL = get_benchmark("resnet20-cifar10-class0")
LEAVES = {
    "params/layer1.0.conv1/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.asarray(7, np.int32),
    "extra/low": np.asarray([1.5, -2], ml_dtypes.bfloat16),
    "params/linear/bias": np.asarray([-np.inf, 1], np.float32),  # of an output mask
    "extra/none": np.zeros((0, 3), np.float32),
    "extra/mask": np.asarray([True, False]),
}
SHAPES = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in LEAVES.items()}


def abstract(position):
    return SHAPES


def entry(folder, protocol=PROTOCOL, digest="d", seed=42, without=None, attempt=0):
    return pretrain_entry(folder, protocol, digest, seed, without, attempt)


def saved(epoch, step=0, diverged=None):
    leaves = {name: np.array(leaf if leaf.dtype == bool else leaf + epoch, leaf.dtype) for name, leaf in LEAVES.items()}
    sums = {"loss": [0.1 * n for n in range(epoch)] + [None]}
    history = History(1.5 * epoch, 0.5 * epoch, diverged, sums, {}, ("a card", "cpu"))
    return Saved(leaves, Position(epoch, step), history)


def save_saying(monkeypatch, without=(), **changes):
    """From here on checkpoints say other things of themselves, and some not."""
    save = Checkpointer.save

    def altered(self, *arguments, custom_metadata, **options):
        kept = {name: value for name, value in custom_metadata.items() if name not in without}
        save(self, *arguments, custom_metadata=kept | changes, **options)

    monkeypatch.setattr(Checkpointer, "save", altered)


def assert_same(one, other):
    assert one[1:] == other[1:] and one.leaves.keys() == other.leaves.keys()
    for name, leaf in one.leaves.items():
        np.testing.assert_array_equal(leaf, other.leaves[name], strict=True)


def test_round_trip_keeps_everything_and_removes_what_it_replaces(tmp_path):
    for one in (saved(0), saved(1), saved(2), saved(2, 30, diverged=17)):
        save_together([entry(tmp_path)], [one])
        (again,) = load_together([entry(tmp_path)], abstract)
        assert_same(again, one)
        assert [path.name for path in entry(tmp_path).folder.iterdir()] == [one.position.name]
    discard(entry(tmp_path))
    assert not entry(tmp_path).folder.exists()


def test_a_checkpoint_from_before_devices_were_counted_names_the_last(tmp_path, monkeypatch):
    save_saying(monkeypatch, without=("devices",))
    save_together([entry(tmp_path)], [saved(1)])
    assert load_together([entry(tmp_path)], abstract)[0].history.devices == (jax.devices()[0].device_kind,)


def test_checkpoints_say_of_themselves_what_they_always_did(tmp_path, monkeypatch):
    one = saved(2, 30, diverged=17)
    save_together([entry(tmp_path)], [one])
    about = checkpoints._orbax().metadata(entry(tmp_path).path(one.position)).custom_metadata
    assert about["digest"] == "f2c74c47a73d92f38883c81bd8e23cbba213dcf19559c846155e26d0b01ae427"
    assert (about["seconds"], about["prepared"], about["diverged"]) == (3.0, 1.0, 17)
    assert (about["sums"], about["evaluated"]) == ({"loss": [0.0, 0.1, None]}, {})
    assert about["devices"] == ["a card", "cpu"]
    # The first ones said less.
    save_saying(monkeypatch, without=("sums", "prepared", "evaluated", "devices"))
    first = saved(3)._replace(history=History(seconds=4.5, devices=(jax.devices()[0].device_kind,)))
    save_together([entry(tmp_path)], [first])
    assert_same(load_together([entry(tmp_path)], abstract)[0], first)


def test_nothing_saved_is_none(tmp_path):
    assert load_together([entry(tmp_path)], abstract) == [None]


def test_key_depends_on_what_pretraining_reads_and_on_nothing_else(tmp_path):
    other = {int: lambda v: v + 1, float: lambda v: v / 2 + 0.125, str: lambda v: v + "x", bool: lambda v: not v}
    for field in dataclasses.fields(PROTOCOL):
        value = getattr(PROTOCOL, field.name)
        changed = other[type(value)](value) if type(value) in other else 500 if value is None else value[::-1]
        same = entry(tmp_path, dataclasses.replace(PROTOCOL, **{field.name: changed})) == entry(tmp_path)
        assert same == (field.name not in PRETRAIN_FIELDS), field.name
    folders = {
        entry(tmp_path, **change).folder
        for change in ({}, {"digest": "e"}, {"seed": 1}, {"without": 0}, {"without": 1}, {"attempt": 1}, {"attempt": 2})
    }
    assert len(folders) == 7


def test_entries_from_before_there_was_validation_are_found(tmp_path):
    assert entry(tmp_path).folder.name == "resnet20-cifar10-seed42-347234e974d8662e"
    method = Method("scrub", None, {}, {"temperature": 4.0}, "s")
    folder = checkpoints.unlearn_entry(tmp_path, PROTOCOL, "d", 42, method).folder
    assert folder.name == "scrub-resnet20-cifar10-seed42-7057974ceb3e83cf"


def test_another_format_is_never_reused(tmp_path, monkeypatch):
    save_together([entry(tmp_path)], [saved(3)])
    monkeypatch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
    assert load_together([entry(tmp_path)], abstract) == [None]


def test_unlearning_depends_on_the_rule_and_its_file(tmp_path):
    rule = tmp_path / "mine.py"

    def folder(text, protocol=PROTOCOL, **settings):
        rule.write_text("def rule(context, *, a: float = 1.0): ...\n" + text)
        return checkpoints.unlearn_entry(tmp_path, protocol, "d", 1, get_method(str(rule), settings)).folder

    changed = dataclasses.replace(PROTOCOL, unlearn_lr=1.0)
    folders = [folder(""), folder("# new\n"), folder("", a="2"), folder("", changed), folder("")]
    assert len(set(folders)) == 4 and folders[0] == folders[-1]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_truncate(folder):
    largest = max(files(folder), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])


def damage_empty(folder):
    for path in files(folder):
        path.unlink()


def damage_foreign(folder):
    """A whole checkpoint, of another seed."""
    other = entry(folder.parent.parent.parent, seed=1)
    save_together([other], [saved(3)])
    shutil.rmtree(folder)
    shutil.copytree(other.path(Position(3, 0)), folder)


def damage_other_place(folder):
    """It says that it is further than it is."""
    folder.rename(folder.with_name(Position(4, 0).name))


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_foreign, damage_other_place])
def test_damaged_checkpoint_is_set_aside_not_used_not_deleted(tmp_path, damage):
    save_together([entry(tmp_path)], [saved(3)])
    damage(entry(tmp_path).path(Position(3, 0)))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert load_together([entry(tmp_path)], abstract) == [None]
    assert list(entry(tmp_path).folder.glob("epoch000*.damaged-*"))


def test_checkpoint_of_another_shape_is_set_aside(tmp_path):
    save_together([entry(tmp_path)], [saved(3)])
    others = SHAPES | {"count": jax.ShapeDtypeStruct((5, 5), np.int32)}
    with pytest.warns(UserWarning, match="of another model"):
        assert load_together([entry(tmp_path)], lambda position: others) == [None]


@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    """One bit in turn of every file: what comes back is what was saved, or nothing."""
    rng, one = np.random.default_rng(1), saved(3)
    save_together([entry(tmp_path)], [one])
    path = entry(tmp_path).path(one.position)
    shutil.copytree(path, tmp_path / "whole")
    refused = 0
    for file in [file for file in files(path) for _ in range(4)]:
        content = bytearray(file.read_bytes())
        if not content:
            continue
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        (again,) = load_together([entry(tmp_path)], abstract)
        refused += again is None
        if again:
            assert_same(again, one)
        shutil.rmtree(entry(tmp_path).folder)
        shutil.copytree(tmp_path / "whole", path)
    assert refused > 10


def test_seeds_go_back_to_what_all_have(tmp_path):
    pair = [entry(tmp_path, seed=seed) for seed in (1, 2)]
    save_together(pair, [saved(1)] * 2)
    both = [one.path(Position(1, 0)) for one in pair]
    for path in both:
        shutil.copytree(path, tmp_path / path.parent.name)
    save_together(pair, [saved(2)] * 2)
    for path in both:
        shutil.copytree(tmp_path / path.parent.name, path)
    shutil.rmtree(pair[1].path(Position(2, 0)))  # as if the process had died before it came to the second
    assert [one.position for one in load_together(pair, abstract)] == [Position(1, 0)] * 2
    assert [one.positions for one in pair] == [{Position(1, 0)}] * 2
    assert [path.exists() for path in both] == [True, True]


def test_seeds_start_again_where_only_some_were_ever_written(tmp_path):
    pair = [entry(tmp_path, seed=seed) for seed in (1, 2)]
    save_together(pair, [saved(1)] * 2)
    shutil.rmtree(pair[1].folder)  # as if the process had died before it came to the second
    assert load_together(pair, abstract) == [None, None]


def test_a_model_outlives_the_removal_of_another(tmp_path):
    pair = [entry(tmp_path, seed=seed) for seed in (1, 2)]
    save_together(pair, [saved(1)] * 2)
    save_together(pair, [saved(9)] * 2)
    shutil.rmtree(pair[1].folder)
    found = load_together(pair, abstract)
    assert found[0].position == Position(9, 0) and found[1] is None


def test_a_seed_alone_goes_on_from_what_was_saved_with_others(tmp_path):
    pair = [entry(tmp_path, seed=seed) for seed in (1, 2)]
    save_together(pair, [saved(1)] * 2)
    save_together(pair[:1], [saved(2)])
    assert [one.position for one in load_together(pair, abstract)] == [Position(2, 0), Position(1, 0)]
    assert load_together([pair[1], entry(tmp_path, seed=3)], abstract)[0].position == Position(1, 0)


def test_what_could_not_be_written_leaves_room(tmp_path, monkeypatch):
    pair = [entry(tmp_path, seed=seed) for seed in (1, 2)]
    save_together(pair, [saved(1)] * 2)
    save, calls = Checkpointer.save, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space")
        save(*args, **options)

    monkeypatch.setattr(Checkpointer, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_together(pair, [saved(2)] * 2)
    assert [one.positions for one in pair] == [{Position(1, 0)}] * 2


def test_seeds_with_nothing_in_common_each_go_on_from_their_own(tmp_path):
    entries = [entry(tmp_path, seed=seed) for seed in range(4)]
    for one, state in zip(entries, (saved(9), saved(2, 5), saved(3)), strict=False):
        save_together([one], [state])
    found = load_together(entries, abstract)
    assert [one and one.position for one in found] == [Position(9, 0), Position(2, 5), Position(3, 0), None]


def test_a_finished_seed_does_not_hold_the_others_back(tmp_path):
    entries = [entry(tmp_path, seed=seed) for seed in range(3)]
    save_together(entries, [saved(9), saved(2, 5), saved(2, 5)])
    found = load_together(entries, abstract)
    assert [one.position for one in found] == [Position(9, 0), Position(2, 5), Position(2, 5)]


def test_what_a_dead_process_left_is_removed(tmp_path):
    save_together([entry(tmp_path)], [saved(3)])
    folder = entry(tmp_path).folder
    for name in ("epoch0004.orbax-checkpoint-tmp-12", "epoch0002.discarded"):
        (folder / name).mkdir()
    load_together([entry(tmp_path)], abstract)
    assert [path.name for path in folder.iterdir()] == ["epoch0003"]


def test_locks_are_held_and_released(tmp_path):
    with locked([entry(tmp_path, seed=seed) for seed in (2, 1)]):
        pass
    with locked([entry(tmp_path, seed=1)]):
        assert len(list((tmp_path / "locks").iterdir())) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_cache_without_locks_is_refused_in_a_line(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"without locks: choose another --cache-dir$"), locked([entry(tmp_path)]):
        pass


@pytest.mark.parametrize(
    ("device", "precision", "said", "used"),
    [("NVIDIA H200", "fp32", False, False), ("NVIDIA H200", "fp32", True, True), ("NVIDIA H200", "bf16", False, True),
     ("NVIDIA H200", "tf32", True, True), ("cpu", "fp32", False, True)],
)  # fmt: skip
def test_what_a_gpu_computed_in_tf32_is_not_taken_for_fp32(tmp_path, monkeypatch, device, precision, said, used):
    one = entry(tmp_path, dataclasses.replace(PROTOCOL, precision=precision))
    save_saying(monkeypatch, without=() if said else ("arithmetic",), device=device)
    save_together([one], [saved(3)])
    if used:
        assert_same(load_together([one], abstract)[0], saved(3))
    else:
        with pytest.warns(UserWarning, match="it was computed in TF32"):
            assert load_together([one], abstract) == [None]
        assert list(one.folder.glob("epoch0003.damaged-*"))


MANY_LOCKS = """
import resource, sys
from pathlib import Path
from jaxunlearn.errors import UserError
from jaxunlearn.training.checkpoints import Entry, locked

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
try:
    with locked([Entry(Path(sys.argv[1], "pretrained", str(i)), {}) for i in range(100)]):
        print("locked")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (resource.getrlimit(resource.RLIMIT_NOFILE)[1], "locked"),
        (64, "too many open files: raise `ulimit -n`, or take fewer seeds or methods at once"),
    ],
)
def test_a_lock_is_an_open_file_as_many_as_the_system_allows(tmp_path, most, said):
    command = [sys.executable, "-c", MANY_LOCKS, str(tmp_path), str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said


def test_an_error_that_passes_says_nothing_of_a_checkpoint(tmp_path, monkeypatch):
    save_together([entry(tmp_path)], [saved(3)])

    def fails(*arguments):
        raise ValueError("of its own kind") from OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of its own kind"):
        patch.setattr(Checkpointer, "restore", fails)
        load_together([entry(tmp_path)], abstract)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stale"):
        patch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
        load_together([entry(tmp_path)], abstract)
    (found,) = load_together([entry(tmp_path)], abstract)
    assert_same(found, saved(3))
