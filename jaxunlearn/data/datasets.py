"""Where images come from: one row a data set, and the places they are looked for.

To add a data set, add a row to DATASETS, with a parser in readers.py if its format is a new one.
"""

import dataclasses
import hashlib
import os
import warnings
from os.path import isfile  # of any text; Path's own raises for some
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxunlearn.data import readers, tfds_source
from jaxunlearn.data.readers import ImageSet
from jaxunlearn.errors import UserError


class Dataset(NamedTuple):
    """Images and labels of one data set, in the order of its files."""

    name: str
    num_classes: int
    train: ImageSet
    test: ImageSet
    source: str  # where it was read from, for humans
    digest: str  # first 16 hex digits of a SHA-256 over the shapes and bytes of the four arrays


class Layout(NamedTuple):
    """One published form of a data set: where its files lie below a place that is looked in, and how to parse them.

    A split is a tuple of groups of files: each group is parsed to one ImageSet, and they are joined in this order.
    """

    folders: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    parse: readers.Parser
    archive: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known about a data set before reading it."""

    num_classes: int
    shape: tuple[int, int, int]  # height, width, channels
    train_count: int  # official
    test_count: int
    layouts: tuple[Layout, ...] = ()  # none: it comes with scikit-learn
    tfds_name: str = ""


_FMNIST = (
    "FashionMNIST/raw",
    "FashionMNIST",
    "fashion_mnist/raw",
    "fashion_mnist",
    "fashion-mnist",
    "",
)  # "": the place itself
_BATCHES = [f"data_batch_{k}" for k in range(1, 6)]

DATASETS = {
    "cifar10": Source(
        num_classes=10,
        shape=(32, 32, 3),
        train_count=50_000,
        test_count=10_000,
        layouts=(
            Layout(
                ("cifar-10-batches-py",),
                tuple((name,) for name in _BATCHES),
                (("test_batch",),),
                readers.parse_cifar_pickle,
                "cifar-10-python.tar.gz",
            ),
            Layout(
                ("cifar-10-batches-bin",),
                tuple((f"{name}.bin",) for name in _BATCHES),
                (("test_batch.bin",),),
                readers.parse_cifar10_binary,
                "cifar-10-binary.tar.gz",
            ),
        ),
        tfds_name="cifar10",
    ),
    "cifar100": Source(  # fine labels
        num_classes=100,
        shape=(32, 32, 3),
        train_count=50_000,
        test_count=10_000,
        layouts=(
            Layout(
                ("cifar-100-python",),
                (("train",),),
                (("test",),),
                readers.parse_cifar_pickle,
                "cifar-100-python.tar.gz",
            ),
            Layout(
                ("cifar-100-binary",),
                (("train.bin",),),
                (("test.bin",),),
                readers.parse_cifar100_binary,
                "cifar-100-binary.tar.gz",
            ),
        ),
        tfds_name="cifar100",
    ),
    "fashion_mnist": Source(
        num_classes=10,
        shape=(28, 28, 1),
        train_count=60_000,
        test_count=10_000,
        layouts=(
            Layout(
                _FMNIST,
                (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),),
                (("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),),
                readers.parse_idx,
            ),
        ),
        tfds_name="fashion_mnist",
    ),
    "digits": Source(num_classes=10, shape=(8, 8, 1), train_count=1_433, test_count=364),
}


def load(name: str, data_dir: Path | None, cache_dir: Path, progress: bool = True) -> Dataset:
    """Reads a data set from the first place that has it, else downloads it with tensorflow-datasets.

    The places: `data_dir`, $JAXUNLEARN_DATA, `cache_dir/data`, `cache_dir/tfds`. In each the standard
    layouts are read as they are, then what tensorflow-datasets prepared. `digits` comes with scikit-learn instead.
    A download shows its `progress` on stderr.

    Images are u8[N, H, W, C], C-contiguous; labels i32[N]. Warns when the counts are not the official ones. Raises
    UserError, in one line, for an unknown name, a `data_dir` without the data set, broken files, a failed download.
    """
    if found := find(name, data_dir, cache_dir):
        return found
    spec, tfds_dir = DATASETS[name], cache_dir / "tfds"
    looked_in = ", ".join(map(str, _places(data_dir, cache_dir)))
    advice = f"or put {_wanted(spec)} in {cache_dir / 'data'} (looked in {looked_in})"
    prepared = tfds_source.prepare(spec.tfds_name, _expanded(tfds_dir), advice, progress)
    return _dataset(name, *tfds_source.read_prepared(prepared, spec.num_classes, spec.shape), str(prepared))


def find(name: str, data_dir: Path | None, cache_dir: Path) -> Dataset | None:
    """`load` without the download: None where no place has the data set."""
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")
    if not DATASETS[name].layouts:
        return _dataset(name, *_load_digits())
    for place in _places(data_dir, cache_dir):
        if found := _look(_expanded(place), DATASETS[name]):
            if data_dir is not None and place != data_dir:
                warnings.warn(f"no {name} in {data_dir}: using {found[2]}", stacklevel=2)
            return _dataset(name, *found)
    return None


def limited(images: ImageSet, num_classes: int, limit: int | None) -> ImageSet:
    """The first `limit // num_classes` images of every class, in file order; all of them where `limit` is None."""
    if limit is None:
        return images
    if limit > len(images.labels):
        raise UserError(f"--train-limit {limit}: there are only {len(images.labels)} training images")
    each, fewest = limit // num_classes, int(np.bincount(images.labels, minlength=num_classes).min())
    if each > fewest:
        raise UserError(f"--train-limit {limit}: there are only {fewest} training images of one class")
    chosen = np.sort(np.concatenate([np.flatnonzero(images.labels == c)[:each] for c in range(num_classes)]))
    return ImageSet(images.images[chosen], images.labels[chosen])


def _places(data_dir: Path | None, cache_dir: Path) -> list[Path]:
    named = [Path(place) for place in (data_dir, os.environ.get("JAXUNLEARN_DATA")) if place]
    return [*named, cache_dir / "data", cache_dir / "tfds"]


def _dataset(name: str, train: ImageSet, test: ImageSet, where: str) -> Dataset:
    spec = DATASETS[name]
    if (len(train.images), len(test.images)) != (spec.train_count, spec.test_count):
        warnings.warn(
            f"{name} in {where} has {len(train.images):,} training and {len(test.images):,} test images "
            f"where the official set has {spec.train_count:,} and {spec.test_count:,}",
            stacklevel=3,
        )
    return Dataset(name, spec.num_classes, train, test, where, _digest(train, test))


def _expanded(place: Path) -> Path:
    return Path(os.path.expanduser(place))  # Path's own raises where there is no such user


def _look(place: Path, spec: Source) -> tuple[ImageSet, ImageSet, str] | None:
    for layout in spec.layouts:
        if found := _read_layout(place, layout, spec):
            return found
    if prepared := tfds_source.find_prepared(place, spec.tfds_name):
        return *tfds_source.read_prepared(prepared, spec.num_classes, spec.shape), str(prepared)
    return None


def _wanted(spec: Source) -> str:
    """The forms that are looked for, for a message."""
    archives = [layout.archive for layout in spec.layouts if layout.archive]
    folders = [f"{layout.folders[0]}/" for layout in spec.layouts]
    if not archives:  # a data set of loose files is known by their names
        folders = [f"{file}[.gz]" for split in (spec.layouts[0].train, spec.layouts[0].test) for file in split[0]]
        return " ".join(folders)
    return ", ".join(archives + folders[:-1]) + f" or {folders[-1]}"


def _read_layout(place: Path, layout: Layout, spec: Source) -> tuple[ImageSet, ImageSet, str] | None:
    """The data set if `place` has any file of this layout."""
    names = [file for group in layout.train + layout.test for file in group]
    folders = [place / folder for folder in layout.folders]
    if place.name in layout.folders:
        folders.append(place)  # the user pointed at the folder itself
    for folder in folders:
        if any(isfile(folder / name) for file in names for name in (file, f"{file}.gz")):
            where, blobs = folder, readers.read_folder(folder, names)
            break
    else:
        if not layout.archive or not isfile(place / layout.archive):
            return None
        where, blobs = place / layout.archive, readers.read_archive(place / layout.archive, names)

    def split(groups: tuple[tuple[str, ...], ...]) -> ImageSet:
        parts = []
        for group in groups:
            files = [blobs[file] for file in group]
            images, labels = layout.parse(files, spec.shape)
            parts.append(readers.checked(images, labels, spec.num_classes, files[-1].where))
        return ImageSet(*map(np.concatenate, zip(*parts, strict=True)))

    return split(layout.train), split(layout.test), str(where)


def _load_digits() -> tuple[ImageSet, ImageSet, str]:
    """Scikit-learn's digits, 0-16 scaled to 0-255. Test: images 0, 5, 10, ... of each class in its order."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rank = np.zeros(len(labels), int)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    test = rank % 5 == 0
    return ImageSet(images[~test], labels[~test]), ImageSet(images[test], labels[test]), "scikit-learn"


def _digest(*sets: ImageSet) -> str:
    sha = hashlib.sha256()
    for array in (array for part in sets for array in part):
        sha.update(f"{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()[:16]
