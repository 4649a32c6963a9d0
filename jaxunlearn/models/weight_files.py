"""Files of weights as numpy arrays by name: NumPy's .npz, .safetensors, and PyTorch's own. No file can run code.

What a file is, its first bytes say; its name may end in anything.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxunlearn.data.archives import GZIP, OTHER_KINDS
from jaxunlearn.errors import UserError
from jaxunlearn.files import write_atomically
from jaxunlearn.models.torch_files import SAVE, TOO_LARGE, read_state_dict

MAX_BYTES = 2 * 2**30  # of a file, decompressed: a checkpoint of our largest model with Adam has 0.4 GB

# Names of safetensors' dtypes. Its own readers for numpy leave bfloat16 out.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

READ = "what is read are .npz, .safetensors and PyTorch's files"
DAMAGED = "it is damaged or only part of a file: fetch or save it again"
TORCH_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # with which PyTorch's files before 1.6 begin, pickled

# Files that are no weights, by how they begin.
OTHERS = (
    (rb"\x89HDF\r\n", "it is an HDF5 file, such as Keras writes: convert it to .npz or .safetensors"),
    (rb"version https://git-lfs", "it is a Git LFS pointer, not the file that it points to: run `git lfs pull`"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", "it is a web page: fetch the file that it links to"),
    (rb"\x93NUMPY", "it is a single array: save all of them with numpy.savez"),
    (b"|".join((*map(re.escape, (GZIP, *OTHER_KINDS)), rb"(?s:.{257}ustar)")), "it is an archive: unpack it"),
    (rb"\x80[\x02-\x05]", f"it is a pickle, which can run code: {SAVE} with torch.save, or arrays with numpy.savez"),
    (rb"\Z", "it is empty"),
    (rb"[\t\n\r\x20-\x7e]+\Z", "it is a text"),
)


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays in a file by name, as they are there but for bfloat16, which becomes float32.

    Args:
      path: a state_dict in an .npz or .safetensors file or, where PyTorch is installed, in one of its own, which may
        also hold it under one of `torch_files.WRAPPERS`. Of .npz and PyTorch's the order is kept.

    Raises:
      UserError: in one line, whatever keeps the file from being read: absent, damaged, of another kind, PyTorch
        missing, something in it that is no array.
    """
    path = Path(path)
    if not os.path.isfile(path):  # of any text; a device or a pipe may never end
        raise UserError(f"no weights file {path}")
    try:
        _check_size(path.stat().st_size)
        arrays = READERS[kind_of(path)](path)
    except UserError as error:
        raise UserError(f"cannot read weights file {path}: {error}") from None
    except ImportError:
        raise UserError(
            f"cannot read weights file {path} without PyTorch: install the extra `parity`, or save it as .safetensors"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read weights file {path}: {error.strerror or DAMAGED}") from None
    except Exception:  # whatever zipfile, zlib, numpy, safetensors and PyTorch make of a damaged file
        raise UserError(f"cannot read weights file {path}: {DAMAGED}") from None
    return {key: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for key, array in arrays.items()}


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state_dict that both `read_weights` and `safetensors.torch.load_file` read; whole at any time."""
    contiguous = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    write_atomically(path, safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


def kind_of(path: Path) -> str:
    """What a file is by its content: "npz", "safetensors" or "torch". Raises UserError, which names what it is else."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path)
    if TORCH_NUMBER in start[:32]:
        return "torch"
    if start[8:9] == b"{":  # behind the length of the header
        return "safetensors"
    for pattern, what in OTHERS:
        if re.match(pattern, start):
            raise UserError(f"{what} ({READ})")
    raise UserError(f"it is no file of weights, or a damaged one: {READ}")


def _kind_of_archive(path: Path) -> str:
    if not is_zipfile(path):  # whose table of contents is at the end
        raise UserError(DAMAGED)
    with ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(f"it is a TorchScript program: {SAVE} of what torch.jit.load makes of it")
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise UserError(f"it is an archive without arrays: unpack it ({READ})")


def _check_size(*sizes: int) -> None:
    if sum(sizes) > MAX_BYTES:
        raise UserError(TOO_LARGE.format(MAX_BYTES))


def _check_archive(path: Path) -> None:
    with ZipFile(path) as archive:
        _check_size(*(member.file_size for member in archive.infolist()))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    _check_archive(path)
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except ValueError as error:
                if "allow_pickle" in str(error):
                    raise UserError(f"'{key}' in it is an object, which can run code: save one array a name") from None
                raise
            if not isinstance(arrays[key], np.ndarray):
                raise UserError(f"'{key}' in it is no array")
            if arrays[key].dtype.kind == "V":  # bfloat16 in a .npz
                raise UserError(f"'{key}' in it has a dtype that NumPy does not know: save it as float32")
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for key, value in safetensors.deserialize(path.read_bytes()):
        if value["dtype"] not in DTYPES:
            raise UserError(f"'{key}' in it has the dtype {value['dtype']}, which is none of {', '.join(DTYPES)}")
        arrays[key] = np.frombuffer(value["data"], DTYPES[value["dtype"]]).reshape(value["shape"])
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    if is_zipfile(path):  # PyTorch's format since 1.6
        _check_archive(path)
    return read_state_dict(path, MAX_BYTES)


READERS = {"npz": _read_npz, "safetensors": _read_safetensors, "torch": _read_torch}
