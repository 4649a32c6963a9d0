"""Small data sets in the published layouts, for the tests that read them."""

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxunlearn.data import datasets
from jaxunlearn.data.datasets import DATASETS, ImageSet
from jaxunlearn.errors import UserError

FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
ARCHIVES = {"cifar10": ("cifar-10-python", "cifar-10-binary"), "cifar100": ("cifar-100-python", "cifar-100-binary")}

# Ten images a batch file: small sets in the official layouts are legitimate, and warned of.
small_sets = pytest.mark.filterwarnings("ignore:.*where the official set has:UserWarning")


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
