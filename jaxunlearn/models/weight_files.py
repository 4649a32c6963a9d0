"""Files of weights as numpy arrays by name: NumPy's .npz, .safetensors, and PyTorch's own. No file can run code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxunlearn.errors import UserError, one_line
from jaxunlearn.files import write_atomically

# Where a checkpoint keeps its state_dict when it holds more, such as the optimizer.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")

MAX_BYTES = 2 * 2**30  # of a file, decompressed: a checkpoint of our largest model with Adam has 0.4 GB
OLDEST_TORCH = "2.10"  # CVE-2025-32434 and CVE-2026-24747: before, `weights_only` does not keep what it promises

# Names of safetensors' dtypes. Its own readers for numpy leave bfloat16 out.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays in a file by name, as they are there but for bfloat16, which becomes float32.

    Args:
      path: a state_dict in an .npz or .safetensors file or, where PyTorch is installed, a .pt, .pth or .th file,
        which may also hold it under one of `WRAPPERS`.

    Raises:
      UserError: in one line, whatever keeps the file from being read: absent, damaged, not what its suffix says, of an
        unknown suffix, PyTorch missing, something in it that is no array.
    """
    path = Path(path)
    read = READERS.get(path.suffix.lower())
    if not os.path.isfile(path):  # of any text; a device or a pipe may never end
        raise UserError(f"no weights file {path}")
    if read is None:
        raise UserError(f"cannot read weights file {path}: its name must end in {', '.join(READERS)}")
    try:
        _check_size(path.stat().st_size)
        arrays = read(path)
    except ImportError:
        raise UserError(
            f"cannot read weights file {path} without PyTorch: install the extra `parity`, or save it as .safetensors"
        ) from None
    except Exception as error:  # whatever zipfile, zlib, numpy, safetensors and PyTorch make of a damaged file
        raise UserError(f"cannot read weights file {path}: {one_line(error)}") from None
    return {key: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for key, array in arrays.items()}


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state_dict that both `read_weights` and `safetensors.torch.load_file` read; whole at any time."""
    contiguous = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    write_atomically(path, safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


def _check_size(*sizes: int) -> None:
    if sum(sizes) > MAX_BYTES:
        raise ValueError(f"it holds more than {MAX_BYTES} bytes, more than weights and an optimizer")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array, not an .npz archive")
        _check_size(*(member.file_size for member in archive.zip.infolist()))
        arrays = {key: archive[key] for key in archive.files}
    if other := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"'{other[0]}' in it is no array")
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for key, value in safetensors.deserialize(path.read_bytes()):
        if value["dtype"] not in DTYPES:
            raise ValueError(f"'{key}' in it has the dtype {value['dtype']}, which is none of {', '.join(DTYPES)}")
        arrays[key] = np.frombuffer(value["data"], DTYPES[value["dtype"]]).reshape(value["shape"])
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import torch  # type: ignore[import-not-found, unused-ignore]

    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(f"PyTorch {torch.__version__} can be made to run code by a file: update it to {OLDEST_TORCH}")
    if is_zipfile(path):  # PyTorch's format since 1.6
        with ZipFile(path) as archive:
            _check_size(*(member.file_size for member in archive.infolist()))
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state:
        raise ValueError("it holds no state_dict: save model.state_dict()")
    if other := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"'{other[0]}' in it is no tensor: save model.state_dict()")
    _check_size(*(value.numel() * value.element_size() for value in state.values()))  # a view can repeat its elements
    # numpy has no bfloat16 for PyTorch to convert to.
    tensors = {str(key): value.float() if value.dtype == torch.bfloat16 else value for key, value in state.items()}
    return {key: value.detach().numpy() for key, value in tensors.items()}


READERS = {".npz": _read_npz, ".safetensors": _read_safetensors} | dict.fromkeys((".pt", ".pth", ".th"), _read_torch)
