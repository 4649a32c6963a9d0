"""Data sets by name, from the first place that has them, else downloaded."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxunlearn.data.downloading import begun, download
from jaxunlearn.data.finding import Found, contents, digest, look
from jaxunlearn.data.readers import ImageSet
from jaxunlearn.data.sources import DATASETS, Source
from jaxunlearn.errors import UserError, printable


class Dataset(NamedTuple):
    """Images and labels of one data set, in the order of its files."""

    name: str
    num_classes: int
    train: ImageSet
    test: ImageSet
    source: str  # where it was read from, for humans
    digest: str  # first 16 hex digits of a SHA-256 over the shapes and bytes of the four arrays
    verified: bool  # whether the digest is that of the official images and labels


def load(name: str, data_dir: Path | None, cache_dir: Path, progress: bool = True) -> Dataset:
    """Reads a data set from the first place that has it, else downloads its official files.

    The places: `data_dir` (a folder or a file), $JAXUNLEARN_DATA, `cache_dir/data`, `cache_dir/tfds`. In each the
    published forms are looked for at the place and a few folders below it, as are archives by what they hold and what
    tensorflow-datasets prepared. `digits` comes with scikit-learn instead. A download goes to `cache_dir/data` and
    shows its `progress` on stderr; none is made where `data_dir` is given.

    Images are u8[N, H, W, C], C-contiguous; labels i32[N]. Warns when the counts or the content are not the official
    ones. Raises UserError, in one line, for an unknown name, a `data_dir` without the data set, broken files, another
    data set in files of the same names, a failed download.
    """
    if found := find(name, data_dir, cache_dir):
        return found
    source, folder = DATASETS[name], _expanded(cache_dir / "data")
    looked_in = "; ".join(contents(_expanded(place)) for place in _places(data_dir, cache_dir))
    if data_dir is not None or not source.tfds_name:
        where = data_dir or "the usual places"
        otherwise = ", or no data folder at all to download it" if source.tfds_name else ", which cannot be downloaded"
        raise UserError(f"no {name} in {where}: name what holds {_wanted(source)}{otherwise} (looked in: {looked_in})")
    advice = f"or put {_wanted(source)} in {folder} (looked in: {looked_in})"
    download(source.tfds_name, folder, advice, progress)
    downloaded = look(folder, source, named=True)
    assert downloaded is not None
    return _dataset(name, downloaded)


def find(name: str, data_dir: Path | None, cache_dir: Path) -> Dataset | None:
    """`load` without the download: None where no place has the data set."""
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")
    if not DATASETS[name].layouts:
        return _dataset(name, _load_digits())
    for place in _places(data_dir, cache_dir):
        folder = _expanded(place)
        try:
            found = look(folder, DATASETS[name], named=place == data_dir)
        except UserError:
            if place != cache_dir / "data" or not begun(DATASETS[name].tfds_name, folder):
                raise
            continue  # a download of several files that has not ended yet, or was stopped: it goes on
        if found:
            if data_dir is not None and place != data_dir:
                warnings.warn(printable(f"no {name} in {data_dir}: using {found.where}"), stacklevel=2)
            return _dataset(name, found)
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


def held_out(images: ImageSet, num_classes: int) -> tuple[ImageSet, ImageSet]:
    """The images in two, both in file order: the last tenth of every class, at least one image, is the second.

    Raises UserError for a class of one image.
    """
    last = np.zeros(len(images.labels), bool)
    for label in range(num_classes):
        places = np.flatnonzero(images.labels == label)
        if len(places) == 1:
            raise UserError(f"--validation: class {label} has a single training image, and none would be trained on")
        last[places[len(places) - max(1, len(places) // 10) :]] = True
    return ImageSet(images.images[~last], images.labels[~last]), ImageSet(images.images[last], images.labels[last])


def _places(data_dir: Path | None, cache_dir: Path) -> list[Path]:
    named = [Path(place) for place in (data_dir, os.environ.get("JAXUNLEARN_DATA")) if place]
    return [*named, cache_dir / "data", cache_dir / "tfds"]


def _dataset(name: str, found: Found) -> Dataset:
    source, (train, test) = DATASETS[name], found[:2]
    verified, where = found.digest in source.digests, printable(str(found.where))
    if (len(train.images), len(test.images)) != (source.train_count, source.test_count):
        warnings.warn(
            f"{name} in {where} has {len(train.images):,} training and {len(test.images):,} test images "
            f"where the official set has {source.train_count:,} and {source.test_count:,}",
            stacklevel=3,
        )
    elif not verified:
        warnings.warn(
            f"{name} in {where} has as many images as the official set but not the same ones, or in another "
            f"order: results are not those of {name} (the records say so)",
            stacklevel=3,
        )
    return Dataset(name, source.num_classes, train, test, str(found.where), found.digest, verified)


def _expanded(place: Path) -> Path:
    return Path(os.path.expanduser(place))  # Path's own raises where there is no such user


def _wanted(source: Source) -> str:
    """The forms that are looked for, for a message."""
    archives = [layout.archive for layout in source.layouts if layout.archive]
    folders = [f"{layout.folders[0]}/" for layout in source.layouts]
    if not archives:  # a data set of loose files is known by their names
        folders = [f"{file}[.gz]" for split in (source.layouts[0].train, source.layouts[0].test) for file in split[0]]
        return " ".join(folders)
    return ", ".join(archives + folders[:-1]) + f" or {folders[-1]}"


def _load_digits() -> Found:
    """Scikit-learn's digits, 0-16 scaled to 0-255. Test: images 0, 5, 10, ... of each class in its order."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rank = np.zeros(len(labels), int)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    test = rank % 5 == 0
    parts = ImageSet(images[~test], labels[~test]), ImageSet(images[test], labels[test])
    return Found(*parts, Path("scikit-learn"), digest(*parts))
