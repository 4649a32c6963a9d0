"""Damaged and hostile data files: arrays or one line, no code, nothing written, bounded memory."""

import gzip
import json
import pickle
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from fuzzing import Trap, damaged, fuzzed, inside, outcome, programs
from hypothesis import given
from hypothesis import strategies as st
from layouts import load, refused, small_sets, write_archive, write_binaries, write_fmnist, write_pickles
from test_tfds import Cifar10, prepare

from jaxunlearn.data import archives, datasets, pickles, readers
from jaxunlearn.data.archives import Blob

pytestmark = [small_sets, pytest.mark.slow]
__all__ = ["inside"]  # a fixture

SHAPE = (32, 32, 3)
PYTHON, BINARY = "cifar-100-python", "cifar-100-binary"


def as_it_is(data):
    return data


def unpacked(path):
    return gzip.decompress(path.read_bytes())


# A place in each layout, and its file that is damaged, as it is or inside its compression.
PLACES = {
    "pickle": ("cifar100", f"{PYTHON}/train", False),
    "records": ("cifar100", f"{BINARY}/train.bin", False),
    "archive": ("cifar100", f"{PYTHON}.tar.gz", False),
    "tar in the archive": ("cifar100", f"{BINARY}.tar.gz", True),
    "idx": ("fashion_mnist", "train-images-idx3-ubyte", False),
    "labels": ("fashion_mnist", "t10k-labels-idx1-ubyte", False),
    "gzip": ("fashion_mnist", "train-images-idx3-ubyte.gz", False),
    "idx in gzip": ("fashion_mnist", "train-images-idx3-ubyte.gz", True),
}


def write_place(place, file):
    """A good data set that has `file`."""
    place.mkdir(exist_ok=True)
    if "idx" in file:
        write_fmnist(place, zipped=file.endswith(".gz"))
    elif file.endswith(".tar.gz"):
        write = write_pickles if PYTHON in file else write_binaries
        write_archive(write(place / "away" / file.removesuffix(".tar.gz"), "cifar100"), place / file)
        shutil.rmtree(place / "away")  # it would be found
    else:
        (write_pickles if PYTHON in file else write_binaries)((place / file).parent, "cifar100")
    return place / file


@pytest.mark.parametrize("kind", PLACES)
@fuzzed(40)
@given(draw=st.data())
def test_damaged_files(kind, draw, inside):
    name, file, within = PLACES[kind]
    path, whole = inside / kind / file, inside / "whole"
    if not path.exists():
        write_place(inside / kind, file)
        whole.write_bytes(unpacked(path) if within else path.read_bytes())
    data = draw.draw(damaged(whole.read_bytes()))
    path.write_bytes(gzip.compress(data, 1) if within else data)
    before = sorted(inside.rglob("*"))
    if found := outcome(load, name, inside / kind):
        for images, labels in (found.train, found.test):
            assert images.dtype == np.uint8 and len(images) == len(labels) > 0
            assert labels.min() >= 0 and labels.max() < found.num_classes
    assert sorted(inside.rglob("*")) == before


@fuzzed(400)
@given(program=programs)
def test_pickles_of_any_opcodes(program, inside):
    outcome(readers.parse_cifar_pickle, [Blob("train", program)], SHAPE)


def header(name, size, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


members = st.builds(
    lambda name, size, kind, body, link: header(name, len(body) if size is None else size, kind, link) + body,
    st.sampled_from(["train", "test", "a/train", "../train", "/train", "tr\udcff", "train/", "x" * 90, ""]),
    st.sampled_from([None, None, 0, -1, 1, 512, 2**33, 2**62]),
    st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"?"]),
    st.sampled_from(
        [b"", bytes(512), b"19 path=../../train\n".ljust(512, b"\0"), b"9 size=-1\n".ljust(512, b"\0"), b"x/train\0"]
    ),
    st.sampled_from(["", "/etc/passwd", "../sprung", "train"]),
)  # fmt: skip


@fuzzed(200)
@given(tar=st.lists(members, max_size=6).map(b"".join))
def test_archives_of_any_members(tar, inside):
    (inside / f"{PYTHON}.tar.gz").write_bytes(gzip.compress(tar, 1))
    assert outcome(archives.read_archive, inside / f"{PYTHON}.tar.gz", ["train", "test"]) is None or b"0" in tar
    assert [path.name for path in inside.iterdir()] == [f"{PYTHON}.tar.gz"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("prepared")
    prepare(Cifar10, place)
    return place


JSON = st.recursive(
    st.sampled_from([None, True, -1, 1e400, "", "train", "os.path.X", "\udcff", [], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "type", "splits", ""]), inner),
    max_leaves=6,
)


@fuzzed(15)
@given(file=st.sampled_from(["dataset_info.json", "features.json"]), draw=st.data())
def test_prepared_folders_with_damaged_descriptions(file, draw, prepared):
    (path,) = prepared.rglob(file)
    whole = path.read_bytes()
    content = draw.draw(damaged(whole) | JSON.map(lambda value: json.dumps(value).encode()))
    try:
        path.write_bytes(content)
        outcome(load, "cifar10", prepared)
    finally:
        path.write_bytes(whole)


# ---- what failed once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_chain_of_headers_that_extend_headers_is_not_followed(kind, inside):
    (inside / f"{PYTHON}.tar.gz").write_bytes(gzip.compress((header("a", 5, kind) + b"5 a=\n".ljust(512)) * 2000))
    assert "lacks test, train" in refused("cifar100", inside)


def test_a_header_that_extends_another_is_not_searched(inside):
    # tarfile looks for a number in it in time that grows with the square: hours, for these digits.
    (inside / f"{PYTHON}.tar.gz").write_bytes(gzip.compress(header("a", 2**22, b"x") + b"1" * 2**22))
    assert "lacks test, train" in refused("cifar100", inside)


@pytest.mark.parametrize(("name", "size"), [("other", 2**32), ("train", 2**32), ("other", -(2**20))])
def test_no_member_is_larger_than_a_file_may_be(name, size, inside):
    (inside / f"{PYTHON}.tar.gz").write_bytes(gzip.compress(header(name, size) + bytes(512)))
    assert "holds more than" in refused("cifar100", inside) or size < 0


def test_all_of_an_archive_is_bounded(inside, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 10_000)
    (inside / f"{PYTHON}.tar.gz").write_bytes(gzip.compress((header("other", 2048) + bytes(2048)) * 5))
    assert "holds more than 10000 bytes" in refused("cifar100", inside)


def nested(times):
    value = [0] * 10
    for _ in range(times):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\xff\xff\xff\x07.",  # an object of number 2^27: two gigabytes for all before it
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": nested(7)}),  # 10^8 numbers
        pickle.dumps({"data": nested(7), "fine_labels": [0]}),
        b"\x80\x02(" + b"]" * 150_000 + b"l.",  # a list a byte
    ],
    ids=["number", "labels", "images", "lists"],
)
def test_a_small_pickle_stays_small(data, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 100_000)
    tracemalloc.start()
    try:
        assert outcome(readers.parse_cifar_pickle, [Blob("train", data)], SHAPE) is None
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_prepared_folder_imports_no_module_of_others(prepared, monkeypatch):
    (path,) = prepared.rglob("features.json")
    whole = path.read_text()
    (prepared / "springing.py").write_text("raise SystemExit('sprung')")
    monkeypatch.syspath_prepend(prepared)
    try:
        for spoiled in (
            whole.replace("tensorflow_datasets.core.features.image_feature.Image", "springing.Image"),
            '{"type": "springing.Image", "content": {}}',
        ):
            path.write_text(spoiled)
            assert "features.json asks for springing.Image" in refused("cifar10", prepared)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("place", ["x" * 300, "a\0b", "~no-such-user/data", "a\nb", "\udcff", "x/" * 3000])
def test_places_that_no_folder_can_have(place, inside):
    for name in ("cifar10", "fashion_mnist"):
        assert f"no {name} in " in refused(name, inside / place if place[0] != "~" else datasets.Path(place))


def test_a_trap_in_a_pickle_is_not_sprung(inside):
    data = pickle.dumps({"data": Trap(), "fine_labels": [0]})
    assert outcome(readers.parse_cifar_pickle, [Blob("train", data)], SHAPE) is None
