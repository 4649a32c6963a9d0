"""Every standard layout gives the same arrays, and places are looked in in order."""

import dataclasses
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    ARCHIVES,
    FOLDERS,
    batches,
    load,
    refused,
    small_sets,
    write_archive,
    write_binaries,
    write_fmnist,
    write_pickles,
)

from jaxunlearn.data import datasets
from jaxunlearn.data.datasets import DATASETS, ImageSet, find
from jaxunlearn.errors import UserError

pytestmark = small_sets


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
        assert datasets.digest(*changed) != found.digest
    assert datasets.digest(found.train, found.test) == found.digest


def test_digits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the counts are the official ones
        found = datasets.load("digits", Path("ignored"), Path("ignored"))
    assert found.verified
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


def test_finding_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.setattr(datasets, "download", lambda *_: pytest.fail("downloaded"))
    assert find("cifar10", None, tmp_path) is None
    digits = find("digits", None, tmp_path)
    assert digits is not None and digits.digest == load("digits", tmp_path).digest


def test_a_data_dir_without_the_data_is_warned_of_before_another_place_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(write_fmnist(tmp_path / "environment")))
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.warns(UserWarning, match=rf"no fashion_mnist in {place}: using .*environment"):
            found = load("fashion_mnist", place)
        assert str(tmp_path / "environment") in found.source
    message = refused("cifar10", tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    for form in ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-batches-py/", "cifar-10-batches-bin/"):
        assert form in message


@pytest.fixture(params=["cifar10", "cifar100", "fashion_mnist"])
def official(request, monkeypatch, tmp_path):
    """Declares a small data set the official one; returns its name, place, and a file that ends in a pixel or label."""
    name, place = request.param, tmp_path / "data"
    if name == "fashion_mnist":
        file = write_fmnist(place) / "t10k-labels-idx1-ubyte"
    else:
        file = write_binaries(place / FOLDERS[name][1], name) / ("test_batch.bin" if name == "cifar10" else "train.bin")
    found = load(name, place)
    counts = {"train_count": len(found.train.labels), "test_count": len(found.test.labels)}
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], **counts, digests=(found.digest,)))
    return name, place, file


def test_official_content_is_verified_in_silence(official):
    name, place, _ = official
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(name, place).verified


def test_other_content_of_the_official_size_is_warned_of(official):
    name, place, file = official
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="as many images as the official set but not the same ones"):
        assert not load(name, place).verified


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
    assert found.digest == digest and found.verified
    assert name != "fashion_mnist" or datasets.digest(*in_the_order_of_tfds(found)) in DATASETS[name].digests


def in_the_order_of_tfds(found):
    """Its shuffle: by the MD5 of the split's name and an image's place."""
    for split, (images, labels) in (("train", found.train), ("test", found.test)):
        order = sorted(range(len(labels)), key=lambda k, split=split: hashlib.md5(f"{split}{k}".encode()).digest())
        yield ImageSet(np.ascontiguousarray(images[order]), labels[order])


def test_train_limit_takes_equally_many_of_each_class_from_the_front():
    labels = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2], np.int32)
    kept = datasets.limited(ImageSet(np.arange(9)[:, None, None, None].astype(np.uint8), labels), 3, 7)
    assert kept.images.ravel().tolist() == [0, 1, 2, 3, 4, 5] and kept.labels.tolist() == [0, 1, 2, 2, 1, 0]
    few = ImageSet(kept.images, np.array([0, 0, 0, 1, 2, 2], np.int32))
    with pytest.raises(UserError, match="--train-limit 6: there are only 1 training images of one class"):
        datasets.limited(few, 3, 6)


def test_of_each_class_the_last_tenth_is_held_out():
    labels = np.array([0] * 20 + [1] * 9 + [0] * 9 + [1, 2, 2], np.int32)
    images = np.arange(41).astype(np.uint8)[:, None, None, None]
    train, validation = datasets.held_out(ImageSet(images, labels), 3)
    assert validation.images.ravel().tolist() == [36, 37, 38, 40] and validation.labels.tolist() == [0, 0, 1, 2]
    assert sorted([*train.images.ravel(), *validation.images.ravel()]) == list(range(41))
    np.testing.assert_array_equal(train.labels, labels[train.images.ravel()])
    with pytest.raises(UserError, match="--validation: class 2 has a single training image"):
        datasets.held_out(ImageSet(images[:40], labels[:40]), 3)


def test_what_nobody_publishes_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.setitem(DATASETS, "flowers", dataclasses.replace(DATASETS["cifar10"], tfds_name=""))
    with pytest.raises(UserError, match=r"^no flowers in the usual places: name what holds .* cannot be downloaded "):
        datasets.load("flowers", None, tmp_path)
