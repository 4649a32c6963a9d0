"""PyTorch state_dict <-> Flax variables.

Submodules carry PyTorch's names, so one rule serves every model: `kernel` and `scale` are `weight` (HWIO <-> OIHW for a
convolution, transposed for a linear layer), `bias` is `bias`, `mean` and `var` are `running_mean` and `running_var`.

What is read may be named otherwise: `fc` for ResNet-20's `linear`, `downsample` for its `shortcut`, all behind the
`module.` of DataParallel or the `_orig_mod.` of torch.compile. `num_batches_tracked` is ignored, and the biases of
convolutions, which torchvision's VGG has and ours does not need, go into the BatchNorm that follows. torchvision's
MobileNetV2 has the same arrays as ours but was trained with ReLU6.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import UserError
from jaxunlearn.models.weight_files import read_weights

Shapes = Mapping[str, tuple[int, ...]]  # by state_dict key

TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_PREFIXES = ("module.", "_orig_mod.")
_OTHER_NAMES = ((re.compile(r"^fc\."), "linear."), (re.compile(r"\.downsample\."), ".shortcut."))


def load_weights(path: str | os.PathLike[str], variables: Any) -> dict[str, Any]:
    """Reads a file with a PyTorch state_dict into variables.

    Args:
      path: what `weight_files.read_weights` reads: .npz, .safetensors, .pt, .pth or .th.
      variables: {"params", "batch_stats"} of the model, arrays or `jax.ShapeDtypeStruct`: gives structure and dtypes.

    Returns:
      The same structure holding the file's values, cast to the dtypes of `variables`.

    Raises:
      UserError: in one line, where the file cannot be read or does not fit.
    """
    arrays = read_weights(path)
    try:
        return from_state_dict(arrays, variables)
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None


def from_state_dict(state: Mapping[str, np.ndarray], variables: Any) -> dict[str, Any]:
    """Variables of the structure and dtypes of `variables` with the values of a PyTorch state_dict of numpy arrays.

    Raises UserError, in one line, for keys that are missing, of no use or of another shape, for weights of the other
    ResNet shortcut or of another classifier, and for values that are not finite.
    """
    names = _our_names(state)
    if wrong := [name for name in names.values() if state[name].dtype.kind not in "fiu"]:
        raise UserError(f"weights must be real numbers: {_listing(wrong)}")
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    expected = {_key(path): _torch_shape(path, leaf.shape) for path, leaf in leaves}
    with np.errstate(all="ignore"):  # what is not finite is refused below
        given = _without_biases({key: state[name] for key, name in names.items()}, expected)
    if problem := _misfit({key: value.shape for key, value in given.items()}, expected, names):
        raise UserError(f"weights do not fit the model: {problem}")
    with np.errstate(all="ignore"):  # too large for the dtype is not finite either
        cast = {_key(path): given[_key(path)].astype(leaf.dtype) for path, leaf in leaves}
    if wrong := [names[key] for key, value in cast.items() if not np.isfinite(value).all()]:
        raise UserError(f"weights must be finite: {_listing(wrong)}")
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(_to_flax(path, cast[_key(path)])), variables)


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """The PyTorch state_dict of variables, as numpy arrays, without `num_batches_tracked`."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {_key(path): _to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def _our_names(state: Mapping[str, Any]) -> dict[str, str]:
    """{our key: key in `state`}, without `num_batches_tracked`."""
    short = {key: key for key in state if not key.endswith("num_batches_tracked")}
    while used := [prefix for prefix in _PREFIXES if short and all(key.startswith(prefix) for key in short)]:
        short = {key.removeprefix(used[0]): name for key, name in short.items()}
    names: dict[str, str] = {}
    for key, name in short.items():
        for pattern, ours in _OTHER_NAMES:
            key = pattern.sub(ours, key)
        if key in names:
            raise UserError(f"weights have one layer twice: {names[key]} and {name}")
        names[key] = name
    return names


def _without_biases(given: Mapping[str, np.ndarray], expected: Shapes) -> dict[str, np.ndarray]:
    """Takes the bias of a convolution from the running mean of the BatchNorm behind it.

    BatchNorm subtracts a mean. The running one of y + b is that of y plus b, so (y + b) - mean = y - (mean - b); the
    batch's own takes b with it, and mean - b then moves as mean does. So both modes stay what they were.
    """
    given = dict(given)
    for key in [key for key, shape in expected.items() if len(shape) == 4]:
        bias, mean = key.removesuffix("weight") + "bias", _norm_behind(key) + ".running_mean"
        if bias in given and mean in given and given[bias].shape == given[mean].shape == expected.get(mean):
            given[mean] = given[mean].astype(np.float64) - given.pop(bias)
    return given


def _norm_behind(key: str) -> str:
    """The BatchNorm behind a convolution: `bn1` of `conv1`, else the next number: `features.1` of `features.0`."""
    parent, dot, name = key.removesuffix(".weight").rpartition(".")
    return parent + dot + (str(int(name) + 1) if name.isdigit() else name.replace("conv", "bn"))


def _misfit(given: Shapes, expected: Shapes, names: Mapping[str, str]) -> str | None:
    """What keeps weights of the shapes `given` out of a model of those `expected`; None if nothing does."""
    shortcuts = [{key for key in shapes if ".shortcut." in key} for shapes in (given, expected)]
    if bool(shortcuts[0]) != bool(shortcuts[1]) and given.keys() - shortcuts[0] == expected.keys() - shortcuts[1]:
        kind = "B" if shortcuts[0] else "A"
        return f"they are those of shortcut {kind}: run with --resnet-shortcut {kind}"
    heads = [_classifier(shapes) for shapes in (given, expected)]
    bodies = [
        {key: shape for key, shape in shapes.items() if not _in_classifier(key, shapes)} for shapes in (given, expected)
    ]
    if heads[0] != heads[1] and bodies[0] == bodies[1]:
        return f"their classifier is {heads[0] or 'missing'}, the model's is {heads[1]}"
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "not of this model": sorted(names[key] for key in given.keys() - expected.keys()),
        "wrong shape": [
            f"{names[key]} {given[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in given and given[key] != shape
        ],
    }
    return "; ".join(f"{what} {_listing(keys)}" for what, keys in problems.items() if keys) or None


def _in_classifier(key: str, shapes: Shapes) -> bool:
    """Whether a key is that of a linear layer, whose weight is a matrix."""
    return len(shapes.get(key.rpartition(".")[0] + ".weight", ())) == 2


def _classifier(shapes: Shapes) -> str:
    """The widths of the linear layers in the order of their names, such as 512-512-100."""
    matrices = [shape for _, shape in sorted(shapes.items()) if len(shape) == 2]
    return "-".join(str(width) for width in [*(inputs for _, inputs in matrices[:1]), *(out for out, _ in matrices)])


def _key(path: tuple[Any, ...]) -> str:
    _, module, name = (entry.key for entry in path)
    return f"{module}.{TORCH_NAME[name]}"


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
