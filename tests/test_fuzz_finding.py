"""Folders of good, damaged and foreign files under any names: arrays or one line, no code, nothing written."""

import contextlib
import functools
import gzip
import tempfile
from pathlib import Path

import pytest
from fuzzing import damaged, fuzzed, inside, outcome
from hypothesis import given
from hypothesis import strategies as st
from layouts import load, small_sets, write_archive, write_binaries, write_fmnist, write_pickles
from test_tfds import Cifar10, as_tfrecords, prepare

from jaxunlearn.data.sources import DATASETS

pytestmark = [small_sets, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*; using :UserWarning")]
__all__ = ["inside"]  # a fixture

PYTHON, BINARY = "cifar-100-python", "cifar-100-binary"


@functools.cache
def whole_files():
    """Good files of every kind, by a name that one may have."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for write, name in ((write_pickles, PYTHON), (write_binaries, BINARY)):
            write_archive(write(place / name, "cifar100"), place / f"{name}.tar.gz")
        write_fmnist(place / "FashionMNIST" / "raw")
        write_archive(place / "FashionMNIST", place / "fashion.tgz")
        files = {path.name: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    files |= {f"{name}.gz": gzip.compress(data, 1) for name, data in files.items() if "idx" in name}
    files |= {name.removesuffix(".gz"): gzip.decompress(data) for name, data in files.items() if ".tar.gz" in name}
    return files


FOLDERS = [
    "",
    "",
    PYTHON,
    BINARY,
    "FashionMNIST/raw",
    "a",
    "cifar100/3.0.2",
    "a/b/c",
    "a/b/c/d",
    ".a",
    "x\ny",
    "\udcff",
]
ODD = [
    "a",
    "a.tar",
    "a.tgz",
    "cifar",
    "dataset_info.json",
    "cifar100-train.tfrecord-00000-of-00001",
    "\udcff.gz",
    "x\ny",
]


@st.composite
def trees(draw):
    """[(folder, file's name, content)]: good, damaged and foreign files under any names anywhere."""
    kinds, files = sorted(whole_files()), []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(kinds))
        name = draw(st.one_of(st.just(kind), st.just(kind), st.sampled_from(kinds + ODD)))
        name += draw(st.sampled_from(["", "", "", ".gz", " (1)", ".part"]))
        data = whole_files()[kind]
        files.append((draw(st.sampled_from(FOLDERS)), name, draw(st.just(data) | damaged(data))))
    return files


@fuzzed(40)
@given(tree=trees(), one=st.booleans())
def test_folders_of_any_files(tree, one, inside):
    with tempfile.TemporaryDirectory(dir=inside) as folder:
        for below, name, data in tree:
            path = Path(folder) / below / name
            with contextlib.suppress(OSError):  # a file where a folder should be
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        before = sorted(Path(folder).rglob("*"))
        place = path if one else Path(folder)
        for name in ("cifar100", "fashion_mnist"):
            if found := outcome(load, name, place):
                for images, labels in (found.train, found.test):
                    assert images.shape == (len(labels), *DATASETS[name].shape) and len(labels) > 0
                    assert labels.min() >= 0 and labels.max() < found.num_classes
        assert sorted(Path(folder).rglob("*")) == before


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    place = tmp_path_factory.mktemp("framed")
    prepare(Cifar10, place)
    as_tfrecords(place, "cifar10")
    return place


@fuzzed(30)
@given(draw=st.data())
def test_damaged_tfrecords(draw, framed):
    (path,) = framed.rglob("*train.tfrecord-00001*")
    whole = path.read_bytes()
    try:
        path.write_bytes(draw.draw(damaged(whole)))
        outcome(load, "cifar10", framed)
    finally:
        path.write_bytes(whole)
