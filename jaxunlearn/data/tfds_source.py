"""Data sets through tensorflow-datasets: reading a prepared one needs no TensorFlow, preparing one does.

The library is imported inside the functions: users of local files should not wait for it.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.data.readers import ImageSet, checked
from jaxunlearn.errors import UserError, one_line


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
    """The train and test sets in a folder prepared in the array_record format.

    CIFAR's examples carry their place in the official files and are put back in that order, so the arrays and their
    digest are those of the official files. FashionMNIST's do not: its order is tensorflow-datasets' own shuffle, the
    same on every machine but not the official one, and the digest differs. UserError if anything is wrong.
    """
    try:
        import tensorflow_datasets as tfds

        _check_features(folder / "features.json")
        builder = tfds.builder_from_directory(folder)
        # Left as PNG: tensorflow-datasets would decode them with the same library, more slowly, and ask for OpenCV.
        raw = {"image": tfds.decode.SkipDecoding()}
        train, test = (_read_split(builder.as_data_source(split, decoders=raw), shape) for split in ("train", "test"))
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is not in the array_record format: prepare it with file_format='array_record', or remove it"
        ) from error
    except Exception as error:  # broken metadata, records and images can raise anything
        raise UserError(f"{folder} cannot be read ({one_line(error)}): remove it to prepare it again") from error
    return checked(*train, num_classes, f"{folder} (train)"), checked(*test, num_classes, f"{folder} (test)")


def _check_features(path: Path) -> None:
    """Raises ValueError where a folder asks for a class of others: tensorflow-datasets would import its module."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
            if named and not value.startswith("tensorflow_datasets."):
                raise ValueError(f"{path.name} asks for {value}")

    json.loads(path.read_bytes(), object_pairs_hook=check)


def _read_split(source, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    examples = source.__getitems__(range(len(source)))
    if examples and "id" in examples[0]:
        examples = sorted(examples, key=lambda example: example["id"])
    images = [_decode_png(example["image"], shape) for example in examples]
    return np.array(images, np.uint8).reshape(-1, *shape), np.array([example["label"] for example in examples], int)


def _decode_png(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != shape[1::-1] or image.mode != {1: "L", 3: "RGB"}[shape[2]]:  # before any pixel is decoded
            raise ValueError(f"an image is {image.mode} of {image.size}, not {shape}")
        return np.asarray(image).reshape(shape)


def prepare(name: str, tfds_dir: Path, advice: str, progress: bool) -> Path:
    """Downloads a data set into `tfds_dir` and returns the prepared folder; needs TensorFlow.

    tensorflow-datasets shows its `progress` on stderr, checks the downloads' SHA-256 and renames a finished folder into
    place. UserError, ending in `advice`, if TensorFlow is missing or anything fails.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f'downloading {name} needs TensorFlow: pip install -e ".[tfds]", {advice}')
    try:
        import requests
        import tensorflow_datasets as tfds

        # It announces itself on stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr if progress else io.StringIO()):
            if not progress:
                tfds.disable_progress_bar()
            builder = tfds.builder(name, data_dir=tfds_dir, file_format="array_record")
            # Its own downloader retries for minutes before it says that there is no network.
            requests.head(next(iter(builder.url_infos)), timeout=30)
            builder.download_and_prepare()
    except Exception as error:  # network, disk, checksum, TensorFlow itself: each has its own kinds
        if not find_prepared(tfds_dir, name):  # else another process was faster
            raise UserError(f"downloading {name} failed ({one_line(error)}): try again, {advice}") from error
    prepared = find_prepared(tfds_dir, name)
    assert prepared is not None
    return prepared
