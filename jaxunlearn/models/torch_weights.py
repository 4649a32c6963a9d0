"""PyTorch state_dict <-> Flax variables.

Submodules carry PyTorch's names, so one rule serves every model: `kernel` and `scale` are `weight` (HWIO <-> OIHW for a
convolution, transposed for a linear layer), `bias` is `bias`, `mean` and `var` are `running_mean` and `running_var`.

What is read may be named otherwise: `downsample` for ResNet-20's `shortcut`, anything for its one linear layer, behind
a prefix that all keys share (`state_dicts`); or all otherwise, where order and shapes tell (`layer_matching`). The
biases of convolutions, which torchvision's VGG has and ours does not need, go into the BatchNorm that follows.
torchvision's MobileNetV2 has the same arrays as ours but was trained with ReLU6.
"""

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import UserError
from jaxunlearn.models.layer_matching import Shapes, match, norm_behind
from jaxunlearn.models.state_dicts import layers
from jaxunlearn.models.weight_files import kind_of, read_weights

LISTED = 5  # of what a message names

TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_OTHER_NAMES = ((re.compile(r"^fc\."), "linear."), (re.compile(r"\.downsample\."), ".shortcut."))


def load_weights(path: str | os.PathLike[str], variables: Any) -> dict[str, Any]:
    """Reads a file with a PyTorch state_dict into variables.

    Args:
      path: what `weight_files.read_weights` reads.
      variables: {"params", "batch_stats"} of the model, arrays or `jax.ShapeDtypeStruct`: gives structure and dtypes.

    Returns:
      The same structure holding the file's values, cast to the dtypes of `variables`.

    Raises:
      UserError: in one line, where the file cannot be read or does not fit.
    """
    return fit_weights(path, read_weights(path), variables)


def fit_weights(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], variables: Any) -> dict[str, Any]:
    """`load_weights` of what `read_weights` has read from `path` already."""
    try:
        return from_state_dict(arrays, variables, ordered=kind_of(Path(path)) != "safetensors")
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None


def from_state_dict(state: Mapping[str, np.ndarray], variables: Any, ordered: bool = True) -> dict[str, Any]:
    """Variables of the structure and dtypes of `variables` with the values of a PyTorch state_dict of numpy arrays.

    Where names are not ours, layers are matched by the order of `state`, if it is `ordered`, with a warning that says
    how.

    Raises UserError, in one line, for keys that are missing, of no use or of another shape, for weights of the other
    ResNet shortcut, of another depth or classifier, for values that are not finite and for negative variances.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    expected = {_key(path): _torch_shape(path, leaf.shape) for path, leaf in leaves}
    arrays = layers(state, own={key.partition(".")[0] for key in expected})
    if wrong := [name for name, value in arrays.items() if value.dtype.kind not in "fiu"]:
        raise UserError(f"weights must be real numbers: {_listing(wrong)}")
    names = _our_names({name: value.shape for name, value in arrays.items()}, expected, ordered)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        given = _without_biases({key: arrays[name] for key, name in names.items()}, expected)
    if problem := _misfit({key: value.shape for key, value in given.items()}, expected, names):
        raise UserError(f"weights do not fit the model: {problem}")
    with np.errstate(all="ignore"):  # too large for the dtype is not finite either
        cast = {_key(path): given[_key(path)].astype(leaf.dtype) for path, leaf in leaves}
    if wrong := [names[key] for key, value in cast.items() if not np.isfinite(value).all()]:
        raise UserError(f"weights must be finite: {_listing(wrong)}")
    if wrong := [names[key] for key, value in cast.items() if key.endswith("running_var") and (value < 0).any()]:
        raise UserError(f"a variance cannot be negative: {_listing(wrong)}")
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(_to_flax(path, cast[_key(path)])), variables)


def to_state_dict(variables: Any) -> dict[str, np.ndarray]:
    """The PyTorch state_dict of variables, as numpy arrays, without `num_batches_tracked`."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {_key(path): _to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def _our_names(given: Shapes, expected: Shapes, ordered: bool) -> dict[str, str]:
    """{our key: key in `given`}, for all keys in `given`; those that are unknown keep their names."""
    theirs, ours = map(_matrices, (given, expected))
    names: dict[str, str] = {}
    for name in given:
        key = name
        if len(theirs) == len(ours) == 1 and name.startswith(theirs[0]):
            key = ours[0] + name.removeprefix(theirs[0])
        for pattern, usual in _OTHER_NAMES:
            key = pattern.sub(usual, key)
        if key in names:
            raise UserError(f"weights have one layer twice: {names[key]} and {name}")
        names[key] = name
    if expected.keys() <= names.keys():
        return names
    try:
        found = match(given, expected, ordered)
    except UserError as error:
        raise UserError(f"weights do not fit the model: {error}") from None
    if found is None:
        return names
    pairs = [f"{other} as {layer}" for layer, other in found.items() if layer != other]
    warnings.warn(f"weights of other names, matched by order and shape: {_listing(pairs)}", stacklevel=2)
    layer_of = {other: layer for layer, other in found.items()}
    return {f"{layer_of[other]}.{leaf}": name for name in given for other, _, leaf in [name.rpartition(".")]}


def _matrices(shapes: Shapes) -> list[str]:
    """The linear layers, each with the dot behind its name."""
    return [key.removesuffix("weight") for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")]


def _without_biases(given: Mapping[str, np.ndarray], expected: Shapes) -> dict[str, np.ndarray]:
    """Takes the bias of a convolution from the running mean of the BatchNorm behind it.

    BatchNorm subtracts a mean. The running one of y + b is that of y plus b, so (y + b) - mean = y - (mean - b); the
    batch's own takes b with it, and mean - b then moves as mean does. So both modes stay what they were.
    """
    given = dict(given)
    for key in [key for key, shape in expected.items() if len(shape) == 4]:
        conv = key.removesuffix(".weight")
        bias, mean = conv + ".bias", norm_behind(conv) + ".running_mean"
        if bias in given and mean in given and given[bias].shape == given[mean].shape == expected.get(mean):
            given[mean] = given[mean].astype(np.float64) - given.pop(bias)
    return given


def _misfit(given: Shapes, expected: Shapes, names: Mapping[str, str]) -> str | None:
    """What keeps weights of the shapes `given` out of a model of those `expected`; None if nothing does."""
    if given == expected:
        return None
    pointwise, spatial = zip(*map(_convolutions, (given, expected)), strict=True)
    if bool(pointwise[0]) != bool(pointwise[1]) and spatial[0] == spatial[1]:
        kind = "B" if pointwise[0] else "A"
        return f"they are those of shortcut {kind}: run with --resnet-shortcut {kind}"
    titles = [_title(shapes) for shapes in (given, expected)]
    if titles[0] and titles[0] != titles[1]:
        return f"they are those of {titles[0]}, the model is {titles[1] or 'another'}"
    heads = [_classifier(shapes) for shapes in (given, expected)]
    bodies = [  # whatever their names
        sorted(shape for key, shape in shapes.items() if not _in_classifier(key, shapes))
        for shapes in (given, expected)
    ]
    if heads[0] != heads[1] and bodies[0] == bodies[1]:
        return f"their classifier is {heads[0] or 'missing'}, the model's is {heads[1]}"
    unused = {names[key]: given[key] for key in sorted(given.keys() - expected.keys())}
    missing = sorted(expected.keys() - given.keys())
    problems = {
        "missing": [key + _nearest(key, expected[key], unused) for key in missing[:LISTED]] + missing[LISTED:],
        "not of this model": list(unused),
        "wrong shape": [
            f"{names[key]} {given[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in given and given[key] != shape
        ],
    }
    return "; ".join(f"{what} {_listing(keys)}" for what, keys in problems.items() if keys)


def _nearest(key: str, shape: tuple[int, ...], unused: Shapes) -> str:
    """The key in the file that a missing one is most like, of the same shape if there is one."""
    same = [name for name in unused if unused[name] == shape] or list(unused)
    return "".join(f" (nearest: {name} {unused[name]})" for name in difflib.get_close_matches(key, same[:1000], 1, 0))


def _convolutions(shapes: Shapes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the kernels of 1x1 pixels, and of the larger ones."""
    kernels = sorted(shape for shape in shapes.values() if len(shape) == 4)
    return [shape for shape in kernels if shape[2:] == (1, 1)], [shape for shape in kernels if shape[2:] != (1, 1)]


def _title(shapes: Shapes) -> str | None:
    """The name of a ResNet with two convolutions a block, or of a VGG, by the widths and the number of convolutions."""
    pointwise, spatial = _convolutions(shapes)
    widths = {shape[0] for shape in spatial}
    if widths == {16, 32, 64} and len(pointwise) < 4 and len(spatial) % 6 == 1:
        return f"ResNet-{len(spatial) + 1}"
    if widths == {64, 128, 256, 512} and len(pointwise) < 4 and len(spatial) in (17, 33):
        return f"ResNet-{len(spatial) + 1}"
    if widths == {64, 128, 256, 512} and not pointwise and len(spatial) in (8, 10, 13, 16):
        return f"VGG-{len(spatial) + 3}"
    return None


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


def _listing(items: list[str]) -> str:
    return ", ".join(items[:LISTED]) + (f" and {len(items) - LISTED} more" if len(items) > LISTED else "")
