"""Pickles of numbers, text and arrays of whole numbers. Nothing in them is called."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

MAX_OBJECTS = 2_000_000  # in a pickle, and of the numbers it gives them: each takes memory. Official: 0.3 million


def load(data: bytes) -> dict[str, Any]:
    """The dictionary that a pickle holds, its keys as text; arrays in it are for `plain`.

    Text of Python 2 is bytes. Numbers of NumPy are those of Python. A broken pickle can raise anything.
    """
    for count, (opcode, number, _) in enumerate(pickletools.genops(data)):
        most = number if isinstance(number, int) and opcode.name.endswith("PUT") else 0
        if max(count, most) > MAX_OBJECTS:
            raise pickle.UnpicklingError(f"more than {MAX_OBJECTS} objects")
    content = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def plain(value: Any) -> np.ndarray:
    """An array, from a pickled one or from a flat list: nested ones can be far larger than the file."""
    if isinstance(value, _Array):
        return value.array
    if not all(isinstance(item, int) for item in value):
        raise ValueError("a list of other things than whole numbers")
    return np.array(value)


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


class ArrayUnpickler(pickle.Unpickler):
    """Loads what CIFAR's pickles hold and refuses every other global.

    Even the few names that array pickles need get stand-ins: numpy's own could be called with other arguments
    (a huge or an object array), and numpy trusts the state of a dtype.
    """

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            "numpy.ndarray": "ndarray",  # only ever passed to _reconstruct, which ignores it
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray._reconstruct": self._reconstruct,
            "numpy.core.multiarray.scalar": self._scalar,
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

    def _scalar(self, dtype: _Dtype, raw: str | bytes) -> int:
        (number,) = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.dtype)
        return int(number)

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")  # how Python 3 writes bytes for Python 2
