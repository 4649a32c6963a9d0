"""Convolution and its two gradients for several seeds at once, in the forms that are fast on GPU and TPU.

Left to `vmap`, a layer of S seeds is a convolution of S groups, and XLA has no kernel gradient of those: it compiles a
forward convolution with a kernel as large as the image. Here every convolution is dense or depthwise.

Every array has the seeds in front: x is [S, B, H, W, C], kernel [S, k, k, C / groups, F], y and its cotangent g
[S, B, ceil(H / stride), ceil(W / stride), F]. All have one dtype, any float.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import Array, lax

# The channels that seeds fill together. One H200, eight ResNet-20 of batch 128, TF32, images/s in all: 92.7k with 64,
# which is four seeds of 16 channels a call, two of 32 or one of 64; 48.8k with one call for each seed; 39.9k left to
# `vmap`. One seed alone: 46.7k.
WIDTH = 64


def lax_conv(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    """`convolution.conv2d` of one seed as XLA has it."""
    # Explicit padding: XLA's "SAME" pads asymmetrically at stride 2.
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def forward(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    """y of every seed."""
    if _is_product(kernel, groups):
        return _product(x, kernel, stride)

    def one(x: Array, kernel: Array, groups: int) -> Array:
        return lax_conv(x, kernel, stride, groups)

    return _folded(one, groups, x, kernel)


def input_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    """The gradient of every seed's x."""
    if _is_product(kernel, groups):
        return jax.linear_transpose(lambda x: _product(x, kernel, stride), x)(g)[0]

    def one(x: Array, kernel: Array, g: Array, groups: int) -> Array:
        return jax.linear_transpose(lambda x: lax_conv(x, kernel, stride, groups), x)(g)[0]

    return _folded(one, groups, x, kernel, g)


def kernel_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    """The gradient of every seed's kernel."""
    if _is_product(kernel, groups):
        return jax.linear_transpose(lambda kernel: _product(x, kernel, stride), kernel)(g)[0]

    def one(x: Array, kernel: Array, g: Array, groups: int) -> Array:
        return jax.linear_transpose(lambda kernel: lax_conv(x, kernel, stride, groups), kernel)(g)[0]

    return _folded(one, groups, x, kernel, g, of_kernel=True)


def _is_product(kernel: Array, groups: int) -> bool:
    return kernel.shape[1] == 1 and groups == 1


def _product(x: Array, kernel: Array, stride: int) -> Array:
    """A 1x1 convolution: one batched product of matrices."""
    return jnp.einsum("sbhwc,scf->sbhwf", x[:, :, ::stride, ::stride], kernel[:, 0, 0])


def _folded(one: Callable[..., Array], groups: int, *arrays: Array, of_kernel: bool = False) -> Array:
    """`one(*arrays, groups)` of every seed in few calls.

    Args:
      one: one of the three operations, for one seed.
      arrays: x, kernel, and g for a gradient.
      of_kernel: whether the result is like `kernel`; else it is images.
    """
    kernel = arrays[1]
    if groups > 1:  # depthwise: channels are apart anyway, whosever they are
        return _unfold(one(*map(_fold, arrays), len(kernel) * groups), len(kernel))
    parts = [_dense(one, *(array[block] for array in arrays), of_kernel=of_kernel) for block in _blocks(kernel)]
    return jnp.concatenate(parts)


def _blocks(kernel: Array) -> Iterator[slice]:
    """The seeds of each call: as few calls as `WIDTH` allows, their sizes as equal as can be."""
    seeds, most = len(kernel), max(1, WIDTH // min(kernel.shape[-2:]))
    count = -(-seeds // most)
    return (slice(*edges) for edges in pairwise(seeds * i // count for i in range(count + 1)))


def _dense(one: Callable[..., Array], x: Array, kernel: Array, *g: Array, of_kernel: bool) -> Array:
    """Arguments and result as of `_folded`, in one call without groups: the kernels are the blocks on its diagonal."""
    seeds = len(kernel)
    if seeds == 1:
        return one(x[0], kernel[0], *(array[0] for array in g), 1)[None]
    images = [x, *g]
    if not of_kernel:
        # Between two seeds stands 0, and 0 times a NaN of one would be a NaN of the other. The one that diverged is
        # seen all the same: its kernel gradient, of which only the diagonal is taken, has the NaN.
        images = [jnp.where(jnp.isfinite(array), array, 0) for array in images]
    x, *g_folded = map(_fold, images)
    result = one(x, _diagonal(kernel), *g_folded, 1)
    return _from_diagonal(result, seeds) if of_kernel else _unfold(result, seeds)


def _fold(array: Array) -> Array:
    """[S, ..., C] -> [..., S C]."""
    return jnp.moveaxis(array, 0, -2).reshape(*array.shape[1:-1], -1)


def _unfold(array: Array, seeds: int) -> Array:
    """[..., S C] -> [S, ..., C]."""
    return jnp.moveaxis(array.reshape(*array.shape[:-1], seeds, -1), -2, 0)


def _diagonal(kernel: Array) -> Array:
    """[S, k, k, C, F] -> [k, k, S C, S F], zero off the diagonal."""
    seeds, size, _, channels, features = kernel.shape
    own = jnp.eye(seeds, dtype=bool)[:, None, :, None]
    blocks = jnp.where(own, kernel.transpose(1, 2, 0, 3, 4)[:, :, :, :, None], 0)
    return blocks.reshape(size, size, seeds * channels, seeds * features)


def _from_diagonal(dense: Array, seeds: int) -> Array:
    """[k, k, S C, S F] -> [S, k, k, C, F]."""
    size, _, channels, features = dense.shape
    blocks = dense.reshape(size, size, seeds, channels // seeds, seeds, features // seeds)
    return jnp.stack([blocks[:, :, i, :, i] for i in range(seeds)])
