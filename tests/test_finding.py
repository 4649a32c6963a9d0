"""Data sets are found where people have them, under the names that they have there, by what they hold."""

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    batches,
    load,
    planar,
    refused,
    small_sets,
    write_archive,
    write_binaries,
    write_fmnist,
    write_pickles,
)

from jaxunlearn.data import archives, finding, sources
from jaxunlearn.data.sources import DATASETS

pytestmark = small_sets
PY = "cifar-10-batches-py"


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """Of the small sets, read from where they are published to lie."""
    place = tmp_path_factory.mktemp("published")
    write_pickles(place / PY, "cifar10")
    write_binaries(place / "cifar-100-binary", "cifar100")
    write_fmnist(place)
    return {name: load(name, place).digest for name in ("cifar10", "cifar100", "fashion_mnist")}


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def archived(path, mode="w:gz", folder=PY, **options):
    """A tar of small CIFAR-10 batches below `folder`, at `path`."""
    source = write_pickles(path.parent / "away" / PY, "cifar10")
    with tarfile.open(path, mode, **options) as tar:
        tar.add(source, folder)
    shutil.rmtree(path.parent / "away")
    return path


FORMS = {
    "torchvision": lambda place: write_pickles(place / "cifar10" / PY, "cifar10"),
    "deep": lambda place: write_pickles(place / "sets" / "cifar10" / PY, "cifar10"),
    "keras 3": lambda place: write_pickles(place / f"{PY}-target" / PY, "cifar10"),
    "renamed folder": lambda place: write_pickles(place / "cifar", "cifar10"),
    "keras 2 archive": lambda place: archived(place / f"{PY}.tar.gz"),
    "no ending": lambda place: archived(place / f"{PY}-target"),
    "browser": lambda place: archived(place / "cifar-10-python (1).tar.gz"),
    "tgz": lambda place: archived(place / "c10.tgz"),
    "tar": lambda place: archived(place / "cifar-10-python.tar", "w"),
    "unzipped by a browser": lambda place: archived(place / "cifar-10-python.tar.gz", "w"),
    "wget": lambda place: archived(place / "cifar-10-python.tar.gz.1"),
    "gnu": lambda place: archived(place / "cifar-10-python.tar.gz", folder="x" * 120, format=tarfile.GNU_FORMAT),
    "pax": lambda place: archived(place / "cifar-10-python.tar.gz", folder="é" * 120, format=tarfile.PAX_FORMAT),
}


@pytest.mark.parametrize("form", FORMS)
def test_cifar_in_every_form_is_the_same(form, digests, tmp_path):
    (tmp_path / "data" / "other").mkdir(parents=True)
    (tmp_path / "data" / "mnist.npz").write_bytes(b"PK\x03\x04")
    written = FORMS[form](tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    assert load("cifar10", tmp_path / "data").digest == digests["cifar10"]
    assert load("cifar10", written).digest == digests["cifar10"]  # the user names the very file or folder
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


def test_cifar_100_is_told_from_cifar_10_by_what_an_archive_holds(digests, tmp_path):
    for name, folder in (("cifar10", "cifar-10-batches-bin"), ("cifar100", "cifar-100-binary")):
        write_archive(write_binaries(tmp_path / "away" / folder, name), tmp_path / f"download of {name}.tgz")
    shutil.rmtree(tmp_path / "away")
    for name in ("cifar10", "cifar100"):
        assert load(name, tmp_path).digest == digests[name]
    assert "lacks data_batch_1" in refused("cifar10", tmp_path / "download of cifar100.tgz")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_labels_may_be_numpys_numbers(kind, protocol, digests, tmp_path):
    folder = write_pickles(tmp_path / PY, "cifar10")
    for file, (images, labels) in batches("cifar10").items():
        content = {"data": planar(images), "labels": [kind(label) for label in labels]}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    assert load("cifar10", tmp_path).digest == digests["cifar10"]


def test_files_that_happen_to_be_called_train_and_test_are_no_cifar_100(digests, tmp_path):
    (tmp_path / "a").mkdir()
    for file in ("train", "test"):
        (tmp_path / "a" / file).write_text("not it")
    write_binaries(tmp_path / "b" / "renamed", "cifar100")
    assert load("cifar100", tmp_path).digest == digests["cifar100"]


def test_a_whole_archive_takes_the_place_of_a_half_unpacked_folder(digests, tmp_path):
    archived(tmp_path / "cifar-10-python.tar.gz")
    (write_pickles(tmp_path / PY, "cifar10") / "data_batch_4").unlink()
    with pytest.warns(UserWarning, match="data_batch_4 is missing.*; using .*cifar-10-python.tar.gz"):
        assert load("cifar10", tmp_path).digest == digests["cifar10"]


# ---- FashionMNIST ----------------------------------------------------------------------------------------------------


def dotted(place):
    for file in write_fmnist(place).iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    return place


def unzipped(place):
    for file in write_fmnist(place).iterdir():
        file.rename(file.with_name(f"{file.name}.gz"))
    return place


def numbered(place):
    for file in write_fmnist(place, zipped=True).iterdir():
        file.rename(file.with_name(file.name.replace(".gz", " (1).gz")))
    return place


def half_written(place):
    write_fmnist(place, zipped=True)
    for file in write_fmnist(place).glob("*ubyte"):
        file.write_bytes(file.read_bytes()[:-7])
    return place


def half_downloaded(place):
    for file in write_fmnist(place, zipped=True).glob("*images*"):
        file.with_name(file.name.replace(".gz", " (1).gz")).write_bytes(file.read_bytes())
        file.write_bytes(file.read_bytes()[:300])
    return place


def packed(place):
    place.mkdir()
    write_archive(write_fmnist(place.parent / "away", zipped=True), place / "fashion.tgz")
    return place


@pytest.mark.parametrize("write", [dotted, unzipped, numbered, half_written, half_downloaded, packed])
def test_fashion_mnist_under_other_names(write, digests, tmp_path):
    assert load("fashion_mnist", write(tmp_path / "data")).digest == digests["fashion_mnist"]


@pytest.mark.parametrize("folder", ["fashion", "data/fashion", "fashion/FashionMNIST/raw", "x/fashion-mnist"])
def test_fashion_mnist_in_other_folders(folder, digests, tmp_path):
    written = write_fmnist(tmp_path / "top" / folder, zipped=True)
    for place in (tmp_path / "top", written.parent, written, written / "t10k-labels-idx1-ubyte.gz"):
        assert load("fashion_mnist", place).digest == digests["fashion_mnist"]


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Where files lie that are known to be MNIST's."""
    folder = write_fmnist(tmp_path / "data" / "MNIST" / "raw")
    for file in folder.glob("t10k-images*"):
        content = bytearray(file.read_bytes())
        content[16] ^= 1
        file.write_bytes(content)
        monkeypatch.setitem(sources.FOREIGN, hashlib.md5(content).hexdigest(), "MNIST")
    return folder


def test_mnist_is_not_read_as_fashion_mnist(mnist, tmp_path):
    for place in (mnist, mnist.parent, mnist.parent.parent):
        assert refused("fashion_mnist", place).startswith(f"{mnist} holds MNIST, another data set in files of the same")
    # Where nobody named it, it is only passed by.
    assert finding.look(mnist.parent, DATASETS["fashion_mnist"], named=False) is None


def test_mnist_beside_fashion_mnist_is_passed_by(mnist, digests, tmp_path):
    write_fmnist(tmp_path / "data" / "ZFashion" / "raw")
    assert load("fashion_mnist", tmp_path / "data").digest == digests["fashion_mnist"]


# ---- where nothing fits ----------------------------------------------------------------------------------------------


def test_where_nothing_fits_the_line_says_what_there_is(tmp_path):
    for file in ("mnist.npz", "cifar-10-python.zip", *(f"z{k}" for k in range(9))):
        (tmp_path / file).write_bytes(b"PK")
    (tmp_path / "photos").mkdir()
    message = refused("cifar10", tmp_path)
    assert f"{tmp_path} has cifar-10-python.zip, mnist.npz, photos/, z0, z1, z2, z3, z4 and 4 more" in message
    assert f"{tmp_path / 'no-cache' / 'data'} does not exist" in message
    assert f"{tmp_path / 'photos'} is empty" in refused("cifar10", tmp_path / "photos")
    assert f"{tmp_path / 'z1'} cannot be read" in refused("cifar10", tmp_path / "z1")


@pytest.mark.parametrize("kind", ["zip", "bztar", "xztar"])
def test_an_archive_of_another_kind_is_to_be_unpacked(kind, tmp_path):
    write_pickles(tmp_path / PY, "cifar10")
    path = Path(shutil.make_archive(str(tmp_path / "cifar"), kind, tmp_path, PY))
    assert refused("cifar10", path).endswith(f"{path} is an archive of another kind than .tar and .tar.gz: unpack it")


def test_what_is_looked_at_is_bounded(tmp_path, monkeypatch, digests):
    write_fmnist(tmp_path / "a" / "b" / "c" / "d")
    assert "no fashion_mnist in" in refused("fashion_mnist", tmp_path)
    assert load("fashion_mnist", tmp_path / "a").digest == digests["fashion_mnist"]
    monkeypatch.setattr(finding, "MAX_ENTRIES", 3)
    assert "no fashion_mnist in" in refused("fashion_mnist", tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    monkeypatch.setattr(finding, "MAX_ENTRIES", 100)
    assert len(list(finding._walk(tmp_path))) < 100


def test_a_member_that_is_cut_short_is_said(tmp_path):
    path = archived(tmp_path / "cifar-10-python.tar", "w")
    path.write_bytes(path.read_bytes()[:40_000])
    assert "is cut short" in refused("cifar10", tmp_path)


def test_an_archive_of_archives_is_bounded(tmp_path, monkeypatch):
    bomb = gzip.compress(bytes(3_000_000))
    with tarfile.open(tmp_path / "fashion.tar", "w") as tar:
        for file in DATASETS["fashion_mnist"].layouts[0].names:
            member = tarfile.TarInfo(f"{file}.gz")
            member.size = len(bomb)
            tar.addfile(member, io.BytesIO(bomb))
    monkeypatch.setattr(archives, "MAX_BYTES", 1_000_000)
    assert "holds more than 1000000 bytes" in refused("fashion_mnist", tmp_path)
