"""Looks for a data set at and below a place, by the names of files and by what archives hold, and reads it."""

import contextlib
import hashlib
import itertools
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os.path import isfile  # of any text; Path's own raises for some
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxunlearn.data import tfds_source
from jaxunlearn.data.archives import Blob, names_in, published_name, read_archive, read_file
from jaxunlearn.data.readers import ImageSet, checked
from jaxunlearn.data.sources import FOREIGN, Layout, Source
from jaxunlearn.errors import UserError, printable

DEPTH = 3  # folders below a place, as in data/fashion/FashionMNIST/raw
MAX_ENTRIES = 20_000  # files and folders that are looked at below a place
MAX_IN_FOLDER = 5_000  # of them, in one folder below
MAX_ARCHIVES = 100  # that are opened below a place to see what they hold
MAX_COPIES = 3  # of one file in one folder
MAX_NAMED = 8  # of a folder's files, in a message

Copies = Mapping[str, Sequence[Path | Blob]]  # by published name, the likeliest first


class Found(NamedTuple):
    """A data set, and where it was read from."""

    train: ImageSet
    test: ImageSet
    where: Path
    digest: str  # first 16 hex digits of a SHA-256 over the shapes and bytes of the four arrays


class _Candidate(NamedTuple):
    where: Path
    read: Callable[[], tuple[ImageSet, ImageSet]]
    expected: bool  # it lies where such a data set does: what is wrong with it is said


def look(place: Path, source: Source, named: bool) -> Found | None:
    """The data set from the first thing at or below `place` that holds it; None where there is none.

    Args:
      named: whether the user named this very place. If so, even what only looks like the data set is an error where
        nothing is whole.

    Warns of what is broken where the data set is published to lie, when something else is whole. Raises UserError, of
    the first of them, when nothing is.
    """
    faults = []
    for candidate in _candidates(place, source):
        try:
            train, test = candidate.read()
            if other := _other_name(test):
                raise UserError(f"{candidate.where} holds {other}, another data set in files of the same names")
        except UserError as error:
            faults.append((candidate.expected, error))
            continue
        for expected, fault in faults:
            if expected:
                warnings.warn(printable(f"{fault}; using {candidate.where}"), stacklevel=2)
        return Found(train, test, candidate.where, digest(train, test))
    for expected, fault in faults:
        if expected or named:
            raise fault
    return None


def contents(place: Path) -> str:
    """What there is at a place, for a message: '`place` has a.zip, b/ and 3 more'."""
    if not os.path.isdir(place):
        return f"{place} is no folder" if os.path.lexists(place) else f"{place} does not exist"
    files, folders = _entries(place)
    names = sorted([*files, *(f"{folder}/" for folder in folders)])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{place} has {', '.join(names[:MAX_NAMED])}{more}" if names else f"{place} is empty"


def digest(*sets: ImageSet) -> str:
    """First 16 hex digits of a SHA-256 over the shapes and bytes of the arrays."""
    sha = hashlib.sha256()
    for array in (array for part in sets for array in part):
        sha.update(f"{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()[:16]


def _other_name(test: ImageSet) -> str | None:
    """The data set that these test images are known to be of, if it is one that has files of the same names."""
    count, height, width, channels = test.images.shape
    if channels != 1:
        return None
    md5 = hashlib.md5(struct.pack(">4I", 2051, count, height, width), usedforsecurity=False)
    md5.update(test.images.data)
    return FOREIGN.get(md5.hexdigest())


# ---- where it may be ----------------------------------------------------------------------------------------------


def _candidates(place: Path, source: Source) -> Iterator[_Candidate]:
    """Whatever may be the data set: first where it is published to lie, then the nearest."""
    if isfile(place):
        yield from _at_file(place, source)
        return
    seen = set()
    for layout in source.layouts:
        folders = [place / folder for folder in layout.folders]
        if place.name in layout.folders:
            folders.append(place)  # the user pointed at the folder itself
        for folder in dict.fromkeys(folders):
            if copies := _copies(folder, _entries(folder)[0], layout):
                seen.add((folder, layout))
                yield _Candidate(folder, partial(_read, copies, folder, layout, source), expected=True)
        if layout.archive and isfile(place / layout.archive):
            seen.add((place / layout.archive, layout))
            yield _of_archive(place / layout.archive, layout, source, expected=True)
    for candidate, form in _below(place, source):
        if (candidate.where, form) not in seen:
            yield candidate


def _at_file(path: Path, source: Source) -> Iterator[_Candidate]:
    if _is_prepared(path.parent, source):
        yield _of_prepared(path.parent, source, expected=True)
        return
    for layout in source.layouts:
        if published_name(path.name) in layout.names:
            copies = _copies(path.parent, _entries(path.parent)[0], layout)
            yield _Candidate(path.parent, partial(_read, copies, path.parent, layout, source), expected=True)
            return
    held = names_in(path)
    for layout in sorted(source.layouts, key=lambda layout: held.isdisjoint(layout.names)):
        yield _of_archive(path, layout, source, expected=True)


def _below(place: Path, source: Source) -> Iterator[tuple[_Candidate, Layout | None]]:
    archives: list[Path] = []
    for folder, files in _walk(place):
        for layout in source.layouts:
            copies = _copies(folder, files, layout)
            if 2 * len(copies) > len(layout.names):  # one alone, such as `test`, can be anything
                yield _Candidate(folder, partial(_read, copies, folder, layout, source), expected=False), layout
        prepared = None
        if folder.name == source.tfds_name:
            prepared = tfds_source.find_prepared(folder.parent, source.tfds_name)
        elif folder == place and _is_prepared(folder, source):
            prepared = folder
        if prepared:
            yield _of_prepared(prepared, source, expected=place in (folder, folder.parent)), None
        archives += [folder / name for name in files if _may_be_an_archive(name)]
    for archive in archives[:MAX_ARCHIVES]:
        held = names_in(archive)
        for layout in source.layouts:
            if not held.isdisjoint(layout.names):
                yield _of_archive(archive, layout, source, expected=False), layout


def _walk(place: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of `place` and what is below it, the nearest first."""
    left, level = MAX_ENTRIES, [place]
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            files, folders = _entries(folder, min(left, MAX_IN_FOLDER))
            left -= len(files) + len(folders)
            yield folder, files
            below += [folder / name for name in folders if not name.startswith(".")]
        level = below


def _entries(folder: Path, most: int | None = None) -> tuple[list[str], list[str]]:
    """The names of a folder's files and folders; none where it is no folder or cannot be read."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, most):
                with contextlib.suppress(OSError):  # a link to itself
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
    except (OSError, ValueError):
        pass
    return sorted(files), sorted(folders)


def _may_be_an_archive(name: str) -> bool:
    return "." not in name or bool(re.search(r"\.tar|\.tgz|\.gz|cifar|mnist", name, re.IGNORECASE))


# ---- reading it ---------------------------------------------------------------------------------------------------


def _copies(folder: Path, files: Sequence[str], layout: Layout) -> Copies:
    wanted = set(layout.names)
    copies: dict[str, list[str]] = {}
    for file in files:
        if (name := published_name(file)) in wanted:
            copies.setdefault(name, []).append(file)
    return {
        name: [folder / file for file in dict.fromkeys((name, f"{name}.gz", *found)) if file in found][:MAX_COPIES]
        for name, found in copies.items()
    }


def _is_prepared(folder: Path, source: Source) -> bool:
    return folder.parent.name == source.tfds_name and isfile(folder / "dataset_info.json")


def _of_prepared(folder: Path, source: Source, expected: bool) -> _Candidate:
    read = partial(tfds_source.read_prepared, folder, source.num_classes, source.shape)
    return _Candidate(folder, read, expected)


def _of_archive(archive: Path, layout: Layout, source: Source, expected: bool) -> _Candidate:
    def read() -> tuple[ImageSet, ImageSet]:
        blobs = read_archive(archive, layout.names)
        return _read({name: [blob] for name, blob in blobs.items()}, archive, layout, source)

    return _Candidate(archive, read, expected)


def _read(copies: Copies, where: Path, layout: Layout, source: Source) -> tuple[ImageSet, ImageSet]:
    for name in layout.names:
        if name not in copies:
            raise UserError(f"{where / name} is missing: put it beside the other files of its data set")

    def split(groups: Sequence[Sequence[str]]) -> ImageSet:
        parts = [_first_whole([copies[name] for name in group], layout, source) for group in groups]
        return ImageSet(*map(np.concatenate, zip(*parts, strict=True)))

    return split(layout.train), split(layout.test)


def _first_whole(group: Sequence[Sequence[Path | Blob]], layout: Layout, source: Source) -> ImageSet:
    """What a group of files holds, of whichever copies are whole. UserError, of the likeliest, if there are none."""
    faults = []
    for files in itertools.product(*group):
        try:
            blobs = [read_file(file) if isinstance(file, Path) else file for file in files]
            images, labels = layout.parse(blobs, source.shape)
            return checked(images, labels, source.num_classes, source.shape, blobs[-1].where)
        except UserError as error:
            faults.append(error)
    raise faults[0]
