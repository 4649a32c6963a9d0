"""Every broken or hostile file gives one line that names it, and runs nothing."""

import io
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    FOLDERS,
    refused,
    small_sets,
    write_archive,
    write_binaries,
    write_fmnist,
    write_pickles,
)

from jaxunlearn.data import archives, pickles
from jaxunlearn.data.readers import checked
from jaxunlearn.errors import UserError

pytestmark = small_sets


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


def pack_binaries(archive):
    write_archive(write_binaries(archive.parent / "away" / "cifar-10-batches-bin", "cifar10"), archive)
    shutil.rmtree(archive.parent / "away")  # it would be found


@pytest.mark.parametrize("damage", [lambda d: d[:200], lambda d: d[:50] + b"\xff" * 50 + d[100:], lambda d: b"<html>"])
def test_broken_gzip_and_tar(damage, tmp_path):
    zipped = write_fmnist(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(damage(zipped.read_bytes()))
    assert str(zipped) in refused("fashion_mnist", tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    pack_binaries(archive)
    archive.write_bytes(damage(archive.read_bytes()))
    assert str(archive) in refused("cifar10", tmp_path)


def test_decompression_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    zipped = write_fmnist(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    assert f"{zipped} holds more than 1000 bytes" in refused("fashion_mnist", tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    pack_binaries(archive)
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
            loaded = pickles.ArrayUnpickler(io.BytesIO(pickle.dumps(variant, protocol)), encoding="bytes").load()
            np.testing.assert_array_equal(loaded.array, array)


def test_python_2_pickles_are_read():
    # What Python 2 and numpy 1 wrote, as in the official archives: text is a byte string, the module is numpy.core.
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x02\x05\xfftb."
    )
    assert pickles.ArrayUnpickler(io.BytesIO(data), encoding="bytes").load().array.tolist() == [5, 255]


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((2, 5, 4, 3), np.uint8), np.zeros((2, 4, 4), np.uint8)]
)
def test_images_that_are_no_bytes_or_of_another_shape_are_none(images):
    with pytest.raises(UserError, match=r"^flowers has images .*, not uint8\[N, 4, 4, 3\]$"):
        checked(images, np.arange(2), 2, (4, 4, 3), "flowers")
