"""PyTorch's own files: the state_dict in one, where PyTorch is installed. What else is in it stays closed.

A checkpoint keeps more than weights: the optimizer, numbers of NumPy's, the command's arguments, a configuration. To
read such an object is to run what the file names. So whatever `weights_only` does not know by itself is given to
PyTorch as a stand-in, which takes everything and does nothing.
"""

import io
import pickletools
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what pickle itself goes by
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from jaxunlearn.errors import UserError

# Where a checkpoint keeps its state_dict when it holds more. Under any other name it must be the only one.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
OLDEST_TORCH = "2.10"  # CVE-2025-32434 and CVE-2026-24747: before, `weights_only` does not keep what it promises
MOST_NAMES = 1000  # of stand-ins: PyTorch goes through all of them for each object

SAVE = "save model.state_dict()"
TOO_LARGE = "it holds more than {} bytes, more than weights and an optimizer"
QUANTIZED = f"it is a quantized model: {SAVE} of the model before quantization"


class StandIn:
    """Stands for an object of what is called `name`, whatever it is made of."""

    name = ""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class DictStandIn:
    """The same for an object with items, which PyTorch puts into nothing but its own kinds of dict."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def read_state_dict(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors of the state_dict in a file, in its order; bfloat16 becomes float32.

    Raises ImportError without PyTorch; UserError where the file holds no state_dict, or that of a quantized model, or
    more than `max_bytes`; and whatever else becomes of a damaged file.
    """
    import torch  # type: ignore[import-not-found, unused-ignore]

    if torch.__version__ < OLDEST_TORCH:
        raise UserError(f"PyTorch {torch.__version__} can be made to run code by a file: update it to {OLDEST_TORCH}")
    state = _state_dict(_load(path), torch.Tensor)
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if any(value.is_quantized for value in tensors.values()) or any("_packed_params" in str(key) for key in state):
        raise UserError(QUANTIZED)
    if sum(value.numel() * value.element_size() for value in tensors.values()) > max_bytes:  # a view can repeat
        raise UserError(TOO_LARGE.format(max_bytes))
    return {key: _array(key, value) for key, value in tensors.items()}


def _array(key: str, tensor: Any) -> np.ndarray:
    import torch

    if tensor.is_meta:
        raise UserError(f"'{key}' in it has no values, as of a model on the device meta: {SAVE} once they are there")
    if tensor.layout != torch.strided:
        raise UserError(f"'{key}' in it is sparse: save its to_dense()")
    try:  # numpy has no bfloat16 for PyTorch to convert to
        array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    except TypeError:
        raise UserError(f"'{key}' in it has the dtype {tensor.dtype}: save its float()") from None
    return array


def _load(path: Path) -> Any:
    """What a file holds, with stand-ins for what is no part of a state_dict."""
    names = _globals(path)
    if len(names) > MOST_NAMES:
        raise UserError(f"it asks for {len(names)} classes and functions, which no state_dict does: {SAVE}")
    others = sorted(name for name in names if not name.startswith(("torch.", "collections.", "_codecs.")))
    try:
        return _load_with(path, names, StandIn)
    except Exception:
        if any(name.startswith("torch.nn.modules.") for name in names):
            raise UserError(f"it is a whole pickled module: {SAVE} where its class is") from None
        if not others:
            raise
    try:  # only trying tells which objects have items
        return _load_with(path, names, DictStandIn)
    except Exception:
        raise UserError(f"it holds more than weights, such as {others[0]}, or is damaged: {SAVE} alone") from None


def _load_with(path: Path, names: set[str], stand_in: type) -> Any:
    import torch

    known: dict[str, Any] = {name: type("StandIn", (stand_in,), {"name": name}) for name in names}
    known |= {name: StandIn for name in names if name.startswith("numpy.")}  # no dicts among them
    known |= {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
    closed = torch.serialization.safe_globals([(value, name) for name, value in known.items()])
    # By a path it would take the name's ending for what the file is. What it warns of nobody here can change.
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"), closed:
        return torch.load(file, map_location="cpu", weights_only=True)


def _globals(path: Path) -> set[str]:
    """The full names of all classes and functions that the pickles of a file ask for."""
    data, pickles = path.read_bytes(), 4  # before PyTorch 1.6: a number, the format, the machine, then the object
    if data.startswith(b"PK"):
        with ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            data, pickles = archive.read(name), 1
    stream, asked = io.BytesIO(data), set()
    for opcode, argument, _ in (found for _ in range(pickles) for found in pickletools.genops(stream)):
        if opcode.name == "PROTO" and int(argument or 0) > 3:
            raise UserError(f"it was saved with pickle_protocol={argument}, which is not read: leave that argument out")
        if opcode.name == "GLOBAL":
            asked.add(".".join(_since_python_2(*str(argument).split(" ", 1))))
    return asked


def _since_python_2(module: str, name: str) -> tuple[str, str]:
    """What something is called today: PyTorch writes the old names."""
    return NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)


def _state_dict(content: Any, tensor: Any) -> Mapping[Any, Any]:
    """The mapping of names to tensors in what a file holds. Raises UserError where there is none, or no single one."""
    if isinstance(content, StandIn):
        raise UserError(f"it is a whole pickled module, {content.name}: {SAVE} where its class is")
    if not isinstance(content, Mapping):
        raise UserError(f"it holds no state_dict: {SAVE}")
    for name in WRAPPERS:
        if isinstance(content.get(name), Mapping | StandIn):
            return _state_dict(content[name], tensor)
    inside = {str(key): value for key, value in content.items() if _has_arrays(value, tensor)}
    if len(inside) > 1:
        raise UserError(f"it holds several state_dicts, {', '.join(inside)}: save the one that is meant")
    if not inside and not _has_arrays(content, tensor):
        raise UserError(f"it holds no state_dict: {SAVE}")
    return next(iter(inside.values()), content)


def _has_arrays(value: Any, tensor: Any) -> bool:
    """Whether it is a mapping with tensors of at least one dimension: the best loss so far may be a tensor too."""
    return isinstance(value, Mapping) and any(isinstance(item, tensor) and item.ndim for item in value.values())
