"""Small pictures of where forgotten images go, where the data set is at hand."""

import base64
import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.data.datasets import Dataset, find, held_out, limited
from jaxunlearn.data.finding import contents
from jaxunlearn.data.readers import ImageSet
from jaxunlearn.data.sources import DATASETS
from jaxunlearn.errors import UserError

ANSWERS, EACH = 6, 5  # of the most frequent answers, and images of each
LARGEST = 2**28  # bytes of a file of predictions


class Answer(NamedTuple):
    """What forgotten training images are answered with."""

    label: int
    share: float  # of them
    pictures: list[str]  # data: addresses of PNGs, in the size of the data set's images
    own: bool  # whether these are such forgotten images, else images of the class that is answered


def datasets(names: Iterable[str], data_dir: Path | None, cache_dir: Path) -> tuple[dict[str, Dataset], list[str]]:
    """The data sets that are at hand, by name, and a line for each that cannot be read, or that a `data_dir` lacks.

    Downloads nothing.
    """
    found: dict[str, Dataset] = {}
    refused: list[str] = []
    for name in dict.fromkeys(names):
        if name not in DATASETS:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                dataset = find(name, data_dir, cache_dir)
        except UserError as error:
            refused.append(f"no pictures of {name}: {error}")
        else:
            if dataset:
                found[name] = dataset
            elif data_dir is not None:
                refused.append(f"no pictures of {name}: {contents(data_dir)}")
    return found, refused


def answers(record: Mapping[str, Any], predictions: Path | None, dataset: Dataset | None) -> list[Answer]:
    """The most frequent answers to the forgotten class's training images in a record, most frequent first.

    None of a record without companions.

    Args:
      predictions: where the run may have left what its model says of each image (`--keep-predictions`); None:
        nobody knows.
    """
    beside = record["companions"]
    if not beside:
        return []
    counts = np.asarray(beside["forgotten_as"]["train"])
    order = [int(label) for label in np.argsort(-counts, kind="stable")[:ANSWERS] if counts[label]]
    digest = record["dataset"]["digest"]
    if dataset is not None and digest not in (None, dataset.digest):
        dataset = None  # the run saw other images
    images = _training_images(record["protocol"], dataset)
    said = None if images is None else _said(record, predictions, images)
    made = []
    for label in order:
        pictures: list[str] = []
        if images is not None and label < (dataset.num_classes if dataset else 0):
            forgotten = images.images[images.labels == record["protocol"]["forget_class"]]
            chosen = images.images[images.labels == label] if said is None else forgotten[said == label]
            pictures = [_address(pixels) for pixels in chosen[:EACH]]
        made.append(Answer(label, float(counts[label] / counts.sum()), pictures, said is not None))
    return made


def _training_images(protocol: Mapping[str, Any], dataset: Dataset | None) -> ImageSet | None:
    """Those that a run of this protocol trained on."""
    if dataset is None:
        return None
    try:
        images = limited(dataset.train, dataset.num_classes, protocol["train_limit"])
        return held_out(images, dataset.num_classes)[0] if protocol["validation"] else images
    except (UserError, TypeError):
        return None


def _said(record: Mapping[str, Any], predictions: Path | None, images: ImageSet) -> np.ndarray | None:
    """i64[N]: the answer to each forgotten training image; None where those of this record and images were not kept."""
    count = int((images.labels == record["protocol"]["forget_class"]).sum())
    shape = count, len(record["companions"]["class_acc"])
    if predictions is None or not predictions.is_file() or predictions.stat().st_size > LARGEST:
        return None
    try:
        with np.load(predictions, allow_pickle=False) as kept:
            with kept.zip.open("forget_train.npy") as file:  # of a stranger's, what it is before it is unpacked
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                found, _, dtype = read(file)
            if found != shape or dtype != np.float16 or str(kept["finished_at"]) != record["finished_at"]:
                return None
            return np.asarray(kept["forget_train"].argmax(1))
    except Exception:  # anything may be wrong with it
        return None


def _address(pixels: np.ndarray) -> str:
    """A data: address of u8[H, W, C] as a PNG."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
