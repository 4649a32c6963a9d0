"""The standard file formats of CIFAR and FashionMNIST, parsed with numpy.

Files come from the internet and are not trusted: archives are read in memory and never extracted, sizes are bounded
before anything is read, and pickles may build numbers, text and arrays of integers but call nothing.
"""

import gzip
import io
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.errors import UserError, one_line

MAX_BYTES = 256 * 2**20  # of a file or an archive, decompressed; the largest official archive has 187 million bytes
MAX_OBJECTS = 2_000_000  # in a pickle, and of the numbers it gives them: each takes memory. Official: 0.3 million
REMEDY = "download it again"


class ImageSet(NamedTuple):
    """Images u8[N, H, W, C], C-contiguous; labels i32[N]."""

    images: np.ndarray
    labels: np.ndarray


class Blob(NamedTuple):
    """A file's contents, and where they were read from."""

    where: str
    data: bytes


Parser = Callable[[Sequence[Blob], tuple[int, int, int]], tuple[np.ndarray, np.ndarray]]


# ---- files --------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, names: Sequence[str]) -> dict[str, Blob]:
    """The named files of a folder, each as it is or gzipped as `name.gz`. UserError if one is missing or broken."""
    blobs = {}
    for name in names:
        path, zipped = folder / name, folder / f"{name}.gz"
        if not isfile(path) and not isfile(zipped):
            raise UserError(f"{path} is missing: put it beside the other files of its data set")
        try:
            if isfile(path):
                with path.open("rb") as file:
                    data = file.read(MAX_BYTES + 1)
            else:
                path = zipped
                with gzip.open(path) as file:
                    data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): {REMEDY}") from error
        if len(data) > MAX_BYTES:
            raise UserError(f"{path} holds more than {MAX_BYTES} bytes: it is not the official file, {REMEDY}")
        blobs[name] = Blob(str(path), data)
    return blobs


def read_archive(archive: Path, names: Sequence[str]) -> dict[str, Blob]:
    """The named files of a `.tar.gz`, in whatever folder inside it. UserError if one is missing or it is broken."""
    blobs: dict[str, Blob] = {}
    missing = set(names)
    try:
        with gzip.open(archive) as stream:
            while missing and (member := _next_member(stream)):
                if stream.tell() + member.size > MAX_BYTES:
                    raise UserError(f"{archive} holds more than {MAX_BYTES} bytes: {REMEDY}")
                data = stream.read(member.size)
                stream.read(-member.size % tarfile.BLOCKSIZE)
                name = PurePosixPath(member.name).name
                if name in missing and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    blobs[name] = Blob(f"{archive}: {name}", data)
                    missing.remove(name)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise UserError(f"{archive} cannot be read ({one_line(error)}): {REMEDY}") from error
    if missing:
        raise UserError(f"{archive} lacks {', '.join(sorted(missing))}: {REMEDY}")
    return blobs


def _next_member(stream: gzip.GzipFile) -> tarfile.TarInfo | None:
    """The next member's header, None at the end: only names of up to 100 bytes, which the official files have.

    The headers that extend others are members without a use here. tarfile itself, where it follows them, takes as
    much memory, time and stack as the file asks for.
    """
    header = stream.read(tarfile.BLOCKSIZE)
    if not header.strip(b"\0"):
        return None
    member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    if member.size < 0:
        raise tarfile.ReadError("a member of negative size")
    return member


# ---- formats: (blobs, (H, W, C)) -> images u8[N, H, W, C], labels[N] ----------------------------------------------


def parse_cifar_pickle(blobs: Sequence[Blob], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The `python` version: a dictionary of `data` u8[N, C*H*W] and `labels`, or for CIFAR-100 `fine_labels`."""
    (where, data), (height, width, channels) = blobs[0], shape
    try:
        for count, (opcode, number, _) in enumerate(pickletools.genops(data)):
            most = number if isinstance(number, int) and opcode.name.endswith("PUT") else 0
            if max(count, most) > MAX_OBJECTS:
                raise pickle.UnpicklingError(f"more than {MAX_OBJECTS} objects")
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()  # Python 2 text is bytes
        table = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        rows = _plain(table["data"])
        labels = _plain(table["fine_labels"] if "fine_labels" in table else table["labels"])
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


def checked(images: np.ndarray, labels: np.ndarray, num_classes: int, where: str) -> ImageSet:
    """An ImageSet of what a parser returned. UserError if it is empty, of two lengths, or has impossible labels."""
    if len(images) != len(labels):
        raise UserError(f"{where} has {len(images)} images but {len(labels)} labels: {REMEDY}")
    if not len(images):
        raise UserError(f"{where} has no images: {REMEDY}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UserError(f"{where} has label {wrong}, outside 0 to {num_classes - 1}: it belongs to another data set")
    return ImageSet(np.ascontiguousarray(images), labels.astype(np.int32))


# ---- pickles ------------------------------------------------------------------------------------------------------


class _Dtype:
    """Stands for numpy.dtype: whole numbers only."""

    def __init__(self, code: str | bytes) -> None:
        self.dtype = np.dtype(code.decode() if isinstance(code, bytes) else code)
        if self.dtype.kind not in "iu":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not allowed")

    def __setstate__(self, state: Any) -> None:
        if state[1] in (">", b">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for numpy.ndarray: made of a dtype, a shape and exactly the bytes they need."""

    array: np.ndarray

    def fill(self, raw: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> "_Array":
        flat = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.dtype)
        self.array = np.reshape(flat, shape, order="F" if order == "F" else "C")
        return self

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.fill(raw, dtype, shape, "F" if is_fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Loads what CIFAR's pickles hold and refuses every other global.

    Even the few names that array pickles need get stand-ins: numpy's own could be called with other arguments
    (a huge or an object array), and numpy trusts the state of a dtype.
    """

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            "numpy.ndarray": "ndarray",  # only ever passed to _reconstruct, which ignores it
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray._reconstruct": self._reconstruct,
            "numpy.core.numeric._frombuffer": self._frombuffer,
            "_codecs.encode": self._encode,
        }
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # numpy 2 renamed it
        if wanted not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {wanted}, which no data file needs")
        return stand_ins[wanted]

    def _dtype(self, code: str | bytes, align: bool, copy: bool) -> _Dtype:
        return _Dtype(code)

    def _reconstruct(self, kind: str, shape: tuple[int], code: bytes) -> _Array:
        return _Array()

    def _frombuffer(self, raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        return _Array().fill(raw, dtype, shape, order)

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")  # how Python 3 writes bytes for Python 2


def _plain(value: Any) -> np.ndarray:
    """An array, from a pickled one or from a flat list: nested ones can be far larger than the file."""
    if isinstance(value, _Array):
        return value.array
    if not all(isinstance(item, int) for item in value):
        raise ValueError("a list of other things than whole numbers")
    return np.array(value)
