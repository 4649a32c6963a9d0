"""PyTorch state_dict <-> Flax variables.

Submodules carry PyTorch's names, so one rule serves every model: `kernel` and `scale` are `weight` (HWIO <-> OIHW for a
convolution, transposed for a linear layer), `bias` is `bias`, `mean` and `var` are `running_mean` and `running_var`.
`num_batches_tracked` is ignored.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import UserError, one_line

_TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_npz(path: str | os.PathLike[str], variables: Any) -> dict[str, Any]:
    """Read the .npz of a PyTorch state_dict into variables.

    Args:
      path: an .npz file, one array a state_dict key.
      variables: {"params", "batch_stats"} of the model, arrays or `jax.ShapeDtypeStruct`: gives structure and dtypes.

    Returns:
      The same structure holding the file's values, cast to the dtypes of `variables`.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array, not an .npz archive")
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise UserError(f"no weights file {name}") from None
    except Exception as error:  # whatever zipfile, zlib and numpy make of a damaged file
        raise UserError(f"cannot read weights file {name}: {one_line(error)}") from None
    try:
        return from_state_dict(arrays, variables)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def from_state_dict(state: Mapping[str, np.ndarray], variables: Any) -> dict[str, Any]:
    """Variables of the structure of `variables` with the values of a PyTorch state_dict of numpy arrays."""
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        expected[_key(path)] = _torch_shape(path, leaf.shape)
    given = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"missing {_listing(missing)}")
    if extra := sorted(given.keys() - expected.keys()):
        problems.append(f"not of this model {_listing(extra)}")
    if wrong := [
        f"{key} {given[key].shape} instead of {shape}"
        for key, shape in expected.items()
        if key in given and given[key].shape != shape
    ]:
        problems.append(f"wrong shape {_listing(wrong)}")
    if wrong := [key for key, value in given.items() if not np.issubdtype(value.dtype, np.number)]:
        problems.append(f"not numbers {_listing(wrong)}")
    if problems:
        raise UserError("weights do not fit the model: " + "; ".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(_to_flax(path, given[_key(path)]), dtype=leaf.dtype), variables
    )


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """The PyTorch state_dict of variables, as numpy arrays, without `num_batches_tracked`."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {_key(path): _to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def _key(path: tuple[Any, ...]) -> str:
    _, module, name = (entry.key for entry in path)
    return f"{module}.{_TORCH_NAME[name]}"


def _torch_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch(path, np.broadcast_to(np.float32(0), shape)).shape


def _to_torch(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    if path[-1].key != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_flax(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    if path[-1].key != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _listing(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
