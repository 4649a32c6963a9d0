"""Data sets that tensorflow-datasets prepared, read without TensorFlow.

The library is imported inside the functions: users of other files should not wait for it.
"""

import io
import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxunlearn.data.readers import ImageSet, checked
from jaxunlearn.errors import UserError, one_line

MAX_EXAMPLES = 200_000  # of a split: an image takes forty times the memory of its smallest PNG. Official: 60 thousand


def find_prepared(place: Path, name: str) -> Path | None:
    """The newest version of a data set that tensorflow-datasets prepared in `place/name/<version>/`, if any."""
    versions = {}
    if not os.path.isdir(place / name):  # of any text, where glob raises for some
        return None
    for info in (place / name).glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):  # not incomplete.XXXXXX_3.0.2
            versions[tuple(map(int, info.parent.name.split(".")))] = info.parent
    return versions[max(versions)] if versions else None


def read_prepared(folder: Path, num_classes: int, shape: tuple[int, int, int]) -> tuple[ImageSet, ImageSet]:
    """The train and test sets in a folder prepared in the array_record or the tfrecord format.

    CIFAR's examples carry their place in the official files and are put back in that order, so the arrays and their
    digest are those of the official files. FashionMNIST's do not: its order is tensorflow-datasets' own shuffle, the
    same on every machine but not the official one, and the digest differs. UserError if anything is wrong.
    """
    try:
        examples = _from_tfrecords if any(folder.glob("*.tfrecord*")) else _from_array_records
        train, test = (_arrays(examples(folder, split), shape) for split in ("train", "test"))
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is in neither the array_record nor the tfrecord format: prepare it in one of them, or remove it"
        ) from error
    except Exception as error:  # broken metadata, records and images can raise anything
        raise UserError(f"{folder} cannot be read ({one_line(error)}): prepare it again, or remove it") from error
    known = num_classes, shape
    return checked(*train, *known, f"{folder} (train)"), checked(*test, *known, f"{folder} (test)")


def _check_features(path: Path) -> None:
    """Raises ValueError where a folder asks for a class of others: tensorflow-datasets would import its module."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
            if named and not value.startswith("tensorflow_datasets."):
                raise ValueError(f"{path.name} asks for {value}")

    json.loads(path.read_bytes(), object_pairs_hook=check)


def _from_array_records(folder: Path, split: str) -> list[Mapping[str, Any]]:
    import tensorflow_datasets as tfds

    _check_features(folder / "features.json")
    builder = tfds.builder_from_directory(folder)
    # Left as PNG: tensorflow-datasets would decode them with the same library, more slowly, and ask for OpenCV.
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return source.__getitems__(range(len(source)))


def _from_tfrecords(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    """The examples in `*-<split>.tfrecord-KKKKK-of-NNNNN`, in this order."""
    from tensorflow_datasets.proto import tf_example_pb2

    shards = sorted(folder.glob(f"*-{split}.tfrecord-*-of-*"))
    if not shards or len(shards) != int(shards[0].name.rpartition("-of-")[2]):
        raise ValueError(f"{len(shards)} files of {split}, some are missing")
    for shard in shards:
        with shard.open("rb") as file:
            for record in _records(file, shard.stat().st_size):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                yield {key: (value.bytes_list.value or value.int64_list.value)[0] for key, value in feature.items()}


def _records(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The records of a TFRecord file: each a length, its checksum, that many bytes and theirs.

    The checksums are CRC-32C, which Python lacks. PNG has its own, and labels are of few values: a check of the
    content as a whole is the data set's digest.
    """
    while header := file.read(12):
        (length,) = struct.unpack("<Q", header[:8])
        if length + 4 > size - file.tell():
            raise ValueError("a record is cut short")
        yield file.read(length)
        file.seek(4, os.SEEK_CUR)


def _arrays(examples: Iterable[Mapping[str, Any]], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    first = itertools.islice(examples, MAX_EXAMPLES + 1)
    decoded: list[tuple[Any, ...]] = [
        (example.get("id"), _decode_png(example["image"], shape), example["label"]) for example in first
    ]
    if len(decoded) > MAX_EXAMPLES:
        raise ValueError(f"more than {MAX_EXAMPLES} examples")
    if decoded and decoded[0][0] is not None:
        decoded.sort(key=lambda example: example[0])
    _, images, labels = zip(*decoded, strict=True) if decoded else ((), (), ())
    return np.array(images, np.uint8).reshape(-1, *shape), np.array(labels, int)


def _decode_png(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != shape[1::-1] or image.mode != {1: "L", 3: "RGB"}[shape[2]]:  # before any pixel is decoded
            raise ValueError(f"an image is {image.mode} of {image.size}, not {shape}")
        return np.asarray(image).reshape(shape)
