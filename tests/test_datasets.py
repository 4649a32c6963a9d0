"""Every standard layout gives the same arrays, and every broken file gives one line that names it."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxunlearn.data import datasets, readers
from jaxunlearn.data.datasets import DATASETS, ImageSet
from jaxunlearn.errors import UserError

# Ten images a batch file: small sets in the official layouts are legitimate, and warned of.
pytestmark = pytest.mark.filterwarnings("ignore:.*where the official set has:UserWarning")
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
ARCHIVES = {"cifar10": ("cifar-10-python", "cifar-10-binary"), "cifar100": ("cifar-100-python", "cifar-100-binary")}


def batches(name: str) -> dict[str, ImageSet]:
    """What each batch file of a small CIFAR holds."""
    rng = np.random.default_rng(0)
    names = ["train", "test"] if name == "cifar100" else [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    classes = DATASETS[name].num_classes
    return {
        file: ImageSet(rng.integers(0, 256, (10, 32, 32, 3), np.uint8), rng.integers(0, classes, 10, np.int32))
        for file in names
    }


def planar(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_pickles(folder: Path, name: str, protocol: int = 2, text=str.encode) -> Path:
    folder.mkdir(parents=True)
    for file, (images, labels) in batches(name).items():
        key = "fine_labels" if name == "cifar100" else "labels"
        content = {"data": planar(images), key: labels.tolist(), "batch_label": text("one of five")}
        if name == "cifar100":
            content["coarse_labels"] = [0] * len(labels)
        with (folder / file).open("wb") as stream:
            pickle.dump({text(key): value for key, value in content.items()}, stream, protocol)
    (folder / "batches.meta").write_bytes(b"not read")
    return folder


def write_binaries(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    for file, (images, labels) in batches(name).items():
        columns = [labels[:, None].astype(np.uint8), planar(images)]
        if name == "cifar100":
            columns.insert(0, np.full((len(labels), 1), 19, np.uint8))  # coarse
        (folder / f"{file}.bin").write_bytes(np.concatenate(columns, axis=1).tobytes())
    return folder


def write_archive(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


def write_fmnist(folder: Path, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 20)):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        for file, data in (
            (f"{split}-images-idx3-ubyte", struct.pack(">4I", 2051, count, 28, 28) + pixels),
            (f"{split}-labels-idx1-ubyte", struct.pack(">2I", 2049, count) + labels),
        ):
            (folder / (file + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return folder


def load(name: str, place: Path) -> datasets.Dataset:
    return datasets.load(name, place, place / "no-cache")


def refused(name: str, place: Path) -> str:
    """The one line that loading `place` ends in."""
    with pytest.raises(UserError) as caught:
        load(name, place)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_cifar_layout_gives_the_same_arrays(name, tmp_path):
    (python, binary), (python_tar, binary_tar) = FOLDERS[name], ARCHIVES[name]
    places = {kind: tmp_path / kind for kind in ("py2", "py4", "py5", "bin", "py.tar", "bin.tar")}
    write_pickles(places["py2"] / python, name)
    write_pickles(places["py4"] / python, name, protocol=4, text=str)
    write_pickles(places["py5"] / python, name, protocol=5, text=str)
    write_binaries(places["bin"] / binary, name)
    for kind, source, archive in (("py.tar", "py2", python_tar), ("bin.tar", "bin", binary_tar)):
        places[kind].mkdir()
        write_archive(next(places[source].iterdir()), places[kind] / f"{archive}.tar.gz")

    *train, test = batches(name).values()
    loaded = {kind: load(name, place) for kind, place in places.items()}
    for kind, found in loaded.items():
        np.testing.assert_array_equal(found.train.images, np.concatenate([part.images for part in train]))
        np.testing.assert_array_equal(found.train.labels, np.concatenate([part.labels for part in train]))
        np.testing.assert_array_equal(found.test.images, test.images)
        np.testing.assert_array_equal(found.test.labels, test.labels)
        assert found.source.startswith(str(places[kind]))
    assert len({found.digest for found in loaded.values()}) == 1
    assert load(name, places["bin"] / binary).digest == loaded["bin"].digest  # the folder itself
    for kind in ("py.tar", "bin.tar"):
        assert len(list(places[kind].iterdir())) == 1  # nothing was extracted


@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw", "fashion_mnist"])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_layouts(folder, zipped, tmp_path):
    write_fmnist(tmp_path / folder, zipped)
    found = load("fashion_mnist", tmp_path)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(found.train.images, rng.integers(0, 256, (30, 28, 28), np.uint8)[..., None])
    np.testing.assert_array_equal(found.test.images, rng.integers(0, 256, (20, 28, 28), np.uint8)[..., None])
    np.testing.assert_array_equal(found.train.labels, np.arange(30) % 10)
    assert found.source == str(tmp_path / folder)


def test_arrays_are_contiguous_and_typed(tmp_path):
    write_binaries(tmp_path / "cifar-10-batches-bin", "cifar10")
    write_fmnist(tmp_path)
    for name in ("cifar10", "fashion_mnist", "digits"):
        found = load(name, tmp_path)
        assert found.name == name and found.num_classes == 10 and len(found.digest) == 16
        for images, labels in (found.train, found.test):
            assert images.dtype == np.uint8 and labels.dtype == np.int32
            assert images.shape == (len(labels), *DATASETS[name].shape)
            assert images.flags.c_contiguous and labels.flags.c_contiguous


def test_the_digest_sees_pixels_labels_and_the_split(tmp_path):
    found = load("digits", tmp_path)
    images, labels = found.train
    for changed in (
        (ImageSet(np.roll(images, 1), labels), found.test),
        (ImageSet(images, np.roll(labels, 1)), found.test),
        (found.test, found.train),
    ):
        assert datasets._digest(*changed) != found.digest
    assert datasets._digest(found.train, found.test) == found.digest


def test_digits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the counts are the official ones
        found = datasets.load("digits", Path("ignored"), Path("ignored"))
    assert len(found.train.images) + len(found.test.images) == 1797
    assert found.train.images.min() == 0 and found.train.images.max() == 255
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        of_class = np.round(digits.images[digits.target == label] * 255 / 16)[..., None]
        np.testing.assert_array_equal(found.test.images[found.test.labels == label], of_class[::5])
        assert (found.train.labels == label).sum() == len(of_class) - len(of_class[::5])


# ---- places ----------------------------------------------------------------------------------------------------------


def test_places_are_looked_in_in_order(tmp_path, monkeypatch):
    given, environment, cache = tmp_path / "given", tmp_path / "environment", tmp_path / "cache"
    for place in (given, environment, cache / "data"):
        write_fmnist(place)
    monkeypatch.setenv("JAXUNLEARN_DATA", str(environment))
    assert datasets.load("fashion_mnist", given, cache).source == str(given)
    assert datasets.load("fashion_mnist", None, cache).source == str(environment)
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path / "nowhere"))
    assert datasets.load("fashion_mnist", None, cache).source == str(cache / "data")
    monkeypatch.delenv("JAXUNLEARN_DATA")
    assert datasets.load("fashion_mnist", None, cache).source == str(cache / "data")


def test_a_data_dir_without_the_data_is_an_error_even_if_other_places_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(write_fmnist(tmp_path / "environment")))
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing"):
        message = refused("fashion_mnist", place)
        assert str(place) in message and "train-images-idx3-ubyte" in message
    message = refused("cifar10", tmp_path / "empty")
    for form in ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-batches-py/", "cifar-10-batches-bin/"):
        assert form in message


def test_unknown_name(tmp_path):
    assert "cifar10, cifar100, fashion_mnist, digits" in refused("cifar", tmp_path)


def test_unofficial_counts_are_warned_of_once(tmp_path):
    write_binaries(tmp_path / "cifar-100-binary", "cifar100")
    with pytest.warns(UserWarning) as caught:
        load("cifar100", tmp_path)
    assert [str(warning.message) for warning in caught] == [
        f"cifar100 in {tmp_path / 'cifar-100-binary'} has 10 training and 10 test images "
        "where the official set has 50,000 and 10,000"
    ]


# ---- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""], ids=["short", "long", "empty"]
)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_binaries_of_the_wrong_size(name, damage, tmp_path):
    folder = write_binaries(tmp_path / FOLDERS[name][1], name)
    broken = folder / ("data_batch_3.bin" if name == "cifar10" else "train.bin")
    broken.write_bytes(damage(broken.read_bytes()))
    assert str(broken) in refused(name, tmp_path)


def test_a_missing_batch_file(tmp_path):
    folder = write_pickles(tmp_path / "cifar-10-batches-py", "cifar10")
    (folder / "data_batch_4").unlink()
    assert f"{folder / 'data_batch_4'} is missing" in refused("cifar10", tmp_path)
    (tmp_path / "b").mkdir()
    write_archive(folder, tmp_path / "b" / "cifar-10-python.tar.gz")
    message = refused("cifar10", tmp_path / "b")
    assert "cifar-10-python.tar.gz" in message and "lacks data_batch_4" in message


def test_labels_of_another_data_set(tmp_path):
    folder = write_binaries(tmp_path / "cifar-10-batches-bin", "cifar10")
    record = bytearray((folder / "test_batch.bin").read_bytes())
    record[3073] = 10
    (folder / "test_batch.bin").write_bytes(record)
    message = refused("cifar10", tmp_path)
    assert "test_batch.bin" in message and "label 10, outside 0 to 9" in message


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        ("train-images-idx3-ubyte", struct.pack(">4I", 2049, 1, 28, 28) + bytes(784), "starts with 2049"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 1, 32, 32) + bytes(1024), "images of [32, 32]"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 2**32 - 1, 28, 28), "0 bytes after its header"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 2, 28, 28) + bytes(784), "784 bytes after its header"),
        ("train-images-idx3-ubyte", b"\0\0\x08", "too short"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 2049, 3) + bytes(3), "20 images but 3 labels"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 2049, 20) + bytes(19) + b"\x0a", "label 10"),
    ],
)
def test_broken_idx_files(file, data, says, tmp_path):
    write_fmnist(tmp_path)
    (tmp_path / file).write_bytes(data)
    message = refused("fashion_mnist", tmp_path)
    assert file in message or "t10k" in message
    assert says in message


def test_an_empty_split(tmp_path):
    write_fmnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 0, 28, 28))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 0))
    assert "no images" in refused("fashion_mnist", tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d[:200], lambda d: d[:50] + b"\xff" * 50 + d[100:], lambda d: b"<html>"])
def test_broken_gzip_and_tar(damage, tmp_path):
    zipped = write_fmnist(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(damage(zipped.read_bytes()))
    assert str(zipped) in refused("fashion_mnist", tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(write_binaries(tmp_path / "away" / "cifar-10-batches-bin", "cifar10"), archive)
    archive.write_bytes(damage(archive.read_bytes()))
    assert str(archive) in refused("cifar10", tmp_path)


def test_decompression_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 1000)
    zipped = write_fmnist(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    assert f"{zipped} holds more than 1000 bytes" in refused("fashion_mnist", tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(write_binaries(tmp_path / "away" / "cifar-10-batches-bin", "cifar10"), archive)
    assert "holds more than 1000 bytes" in refused("cifar10", tmp_path)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def place_with(content: object, tmp_path: Path) -> Path:
    folder = write_pickles(tmp_path / "cifar-100-python", "cifar100")
    (folder / "train").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    return tmp_path


def test_a_malicious_pickle_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    message = refused("cifar100", place_with({b"data": Call(os.system, f"touch {marker}")}, tmp_path))
    assert not marker.exists()
    assert str(tmp_path / "cifar-100-python" / "train") in message and ".system" in message


@pytest.mark.parametrize(
    "bomb",
    [
        Call(np.ndarray, (2**40,), "u1"),
        Call(np.empty, 2**40),
        Call(eval, "1"),
        Call(np.dtype, "O"),
        np.array([{}], dtype=object),
        np.zeros(4, [("a", "u1")]),
    ],
    ids=["ndarray", "empty", "eval", "object dtype", "object array", "structured array"],
)
def test_pickles_build_only_arrays_of_whole_numbers(bomb, tmp_path):
    assert "train is not a CIFAR batch" in refused(
        "cifar100", place_with({b"data": bomb, b"fine_labels": [0]}, tmp_path)
    )


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "EOFError"),
        (pickle.dumps({b"data": PIXELS, b"fine_labels": [0, 1]}, protocol=2)[:-30], "is not a CIFAR batch"),
        ([1], "is not a CIFAR batch"),
        ({b"data": PIXELS}, "labels"),
        ({b"data": PIXELS[:, 1:], b"fine_labels": [0, 1]}, "uint8[2, 3071]"),
        ({b"data": PIXELS.astype(np.int64), b"fine_labels": [0, 1]}, "int64[2, 3072]"),
        ({b"data": PIXELS, b"fine_labels": [0.5, 1]}, "whole numbers"),
        ({b"data": PIXELS, b"fine_labels": [10**30, 1]}, "whole numbers"),
        ({b"data": PIXELS, b"fine_labels": [[0], [0, 1]]}, "is not a CIFAR batch"),
        ({b"data": PIXELS, b"fine_labels": [0]}, "2 images but 1 labels"),
        ({b"data": PIXELS, b"fine_labels": [0, -1]}, "label -1"),
        ({b"data": PIXELS, b"fine_labels": [0, 100]}, "label 100"),
        (pickle.dumps({b"data": PIXELS[:0], b"fine_labels": []}, protocol=4), "no images"),
    ],
)
def test_broken_pickles(content, says, tmp_path):
    message = refused("cifar100", place_with(content, tmp_path))
    assert str(tmp_path / "cifar-100-python" / "train") in message and says in message


def test_pickles_may_order_their_arrays_as_they_like():
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    for protocol in (2, 4, 5):
        for variant in (array, np.asfortranarray(array)):
            loaded = readers._ArrayUnpickler(io.BytesIO(pickle.dumps(variant, protocol)), encoding="bytes").load()
            np.testing.assert_array_equal(loaded.array, array)


def test_python_2_pickles_are_read():
    # What Python 2 and numpy 1 wrote, as in the official archives: text is a byte string, the module is numpy.core.
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x02\x05\xfftb."
    )
    assert readers._ArrayUnpickler(io.BytesIO(data), encoding="bytes").load().array.tolist() == [5, 255]


# ---- the real files --------------------------------------------------------------------------------------------------

# One of the folders they may lie in, the digest, and the widely printed first label and pixel of the training images.
REAL = {
    "cifar10": (FOLDERS["cifar10"], "c257da322a0d649b", 6, [59, 62, 63]),
    "cifar100": (FOLDERS["cifar100"], "c401087103404d90", 19, [255, 255, 255]),
    "fashion_mnist": (("FashionMNIST/raw",), "690bb3f5c635d3f3", 9, [0]),
}


def real(name: str):
    place = Path(os.environ.get("JAXUNLEARN_DATA", "/nonexistent"))
    missing = not any((place / folder).exists() for folder in REAL[name][0])
    return pytest.param(
        name, marks=pytest.mark.skipif(missing, reason=f"needs the real {name} files: set JAXUNLEARN_DATA")
    )


@pytest.mark.parametrize("name", [real(name) for name in REAL])
def test_the_real_files(name, tmp_path):
    _, digest, label, pixel = REAL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the counts are the official ones
        found = datasets.load(name, None, tmp_path)
    for _, labels in (found.train, found.test):
        assert set(np.bincount(labels)) == {len(labels) // found.num_classes}
    assert found.train.labels[0] == label and found.train.images[0, 0, 0].tolist() == pixel
    assert found.digest == digest
