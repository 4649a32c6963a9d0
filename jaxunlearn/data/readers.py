"""The standard file formats of CIFAR and FashionMNIST, parsed with numpy."""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxunlearn.data import pickles
from jaxunlearn.data.archives import REMEDY, Blob
from jaxunlearn.errors import UserError, one_line


class ImageSet(NamedTuple):
    """Images u8[N, H, W, C], C-contiguous; labels i32[N]."""

    images: np.ndarray
    labels: np.ndarray


Parser = Callable[[Sequence[Blob], tuple[int, int, int]], tuple[np.ndarray, np.ndarray]]


# ---- formats: (blobs, (H, W, C)) -> images u8[N, H, W, C], labels[N] ----------------------------------------------


def parse_cifar_pickle(blobs: Sequence[Blob], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The `python` version: a dictionary of `data` u8[N, C*H*W] and `labels`, or for CIFAR-100 `fine_labels`."""
    (where, data), (height, width, channels) = blobs[0], shape
    try:
        table = pickles.load(data)
        rows = pickles.plain(table["data"])
        labels = pickles.plain(table["fine_labels"] if "fine_labels" in table else table["labels"])
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{where} is not a CIFAR batch ({one_line(error)}): {REMEDY}") from error
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != height * width * channels:
        raise UserError(f"{where}: its images are {rows.dtype}{list(rows.shape)}, not uint8 of {shape}: {REMEDY}")
    if labels.ndim != 1 or (labels.dtype.kind not in "iu" and len(labels)):
        raise UserError(f"{where}: its labels are not a list of whole numbers: {REMEDY}")
    return rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1), labels


def parse_cifar10_binary(blobs: Sequence[Blob], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and C*H*W pixels, one byte each."""
    return _parse_records(blobs[0], shape, label_bytes=1)


def parse_cifar100_binary(blobs: Sequence[Blob], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Records of a coarse label, a fine label (the one kept) and C*H*W pixels, one byte each."""
    return _parse_records(blobs[0], shape, label_bytes=2)


def parse_idx(blobs: Sequence[Blob], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's format: an images file and a labels file, each a big-endian header and bytes."""
    images, labels = blobs
    height, width, _ = shape  # one channel
    pixels = _parse_idx_file(images, magic=2051, dims=(height, width))
    return pixels[..., None], _parse_idx_file(labels, magic=2049, dims=())


def _parse_records(blob: Blob, shape: tuple[int, int, int], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels = shape
    record = label_bytes + height * width * channels
    if len(blob.data) % record:
        raise UserError(
            f"{blob.where} has {len(blob.data)} bytes, not a multiple of the {record} of an image: {REMEDY}"
        )
    rows = np.frombuffer(blob.data, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, channels, height, width).transpose(0, 2, 3, 1), rows[:, label_bytes - 1]


def _parse_idx_file(blob: Blob, magic: int, dims: tuple[int, ...]) -> np.ndarray:
    header = struct.Struct(f">{2 + len(dims)}I")
    if len(blob.data) < header.size:
        raise UserError(f"{blob.where} is too short for an idx file: {REMEDY}")
    found, count, *sides = header.unpack_from(blob.data)
    if found != magic:
        raise UserError(f"{blob.where} starts with {found}, not the {magic} of such an idx file: {REMEDY}")
    if tuple(sides) != dims:
        raise UserError(f"{blob.where} has images of {sides}, not {list(dims)}: it belongs to another data set")
    body = np.frombuffer(blob.data, np.uint8, offset=header.size)
    if body.size != count * int(np.prod(dims)):
        raise UserError(
            f"{blob.where} has {body.size} bytes after its header, not {count * int(np.prod(dims))}: {REMEDY}"
        )
    return body.reshape(count, *dims)


def checked(
    images: np.ndarray, labels: np.ndarray, num_classes: int, shape: tuple[int, int, int], where: str
) -> ImageSet:
    """An ImageSet of what a parser returned.

    UserError if it is empty, of two lengths, or has impossible labels, or images that are no bytes or of another shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise UserError(f"{where} has images {images.dtype}{list(images.shape)}, not uint8[N, {str(list(shape))[1:]}")
    if len(images) != len(labels):
        raise UserError(f"{where} has {len(images)} images but {len(labels)} labels: {REMEDY}")
    if not len(images):
        raise UserError(f"{where} has no images: {REMEDY}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UserError(f"{where} has label {wrong}, outside 0 to {num_classes - 1}: it belongs to another data set")
    return ImageSet(np.ascontiguousarray(images), labels.astype(np.int32))
