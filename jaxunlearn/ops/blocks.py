"""Convolution and its two gradients for several seeds at once, in the forms that are fast on GPU and TPU.

Left to `vmap`, a layer of S seeds is a convolution of S groups, and XLA has no kernel gradient of those: it compiles a
forward convolution with a kernel as large as the image. Here the seeds lie side by side in the channels and a layer is
one call, whose kernel gradient XLA knows.

Every array has the seeds in front: x is [S, B, H, W, C], kernel [S, k, k, C / groups, F], y and its cotangent g
[S, B, ceil(H / stride), ceil(W / stride), F]. All have one dtype, any float.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

# Channels that a group of such a call has at least where there are so many, filled by several seeds whose kernels are
# the blocks on the diagonal of one dense kernel: for images (y and their gradient) and for the gradient of kernels, by
# the bytes of a number. One H200, eight ResNet-20 of batch 128, images/s in all: bf16 209k with 128 and 128, 173k with
# 16 and 64; TF32 111k with 16 and 64, 106k with 64 and 64, 93k with a call for each 64 channels. One seed: bf16 74k,
# TF32 55k.
WIDTHS = {2: (128, 128), 4: (16, 64)}


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
    together = _seeds_of_a_group(kernel, groups, of_kernel=False)
    x, dense = _fold(_guarded(x, together)), _diagonal(kernel, together)
    return _unfold(lax_conv(x, dense, stride, len(kernel) // together * groups), len(kernel))


def input_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    """The gradient of every seed's x."""
    together = _seeds_of_a_group(kernel, groups, of_kernel=False)
    dense, count = _diagonal(kernel, together), len(kernel) // together * groups
    (dx,) = jax.linear_transpose(lambda x: lax_conv(x, dense, stride, count), _fold(x))(_fold(_guarded(g, together)))
    return _unfold(dx, len(kernel))


def kernel_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    """The gradient of every seed's kernel."""
    together = _seeds_of_a_group(kernel, groups, of_kernel=True)
    dense, count = _diagonal(kernel, together), len(kernel) // together * groups
    (dkernel,) = jax.linear_transpose(lambda kernel: lax_conv(_fold(x), kernel, stride, count), dense)(_fold(g))
    return _from_diagonal(dkernel, len(kernel), together)


def _seeds_of_a_group(kernel: Array, groups: int, of_kernel: bool) -> int:
    """The fewest that divide all and are as wide as `WIDTHS` says; 1 where that would be four times as wide."""
    seeds, channels = len(kernel), min(kernel.shape[-2:])
    width = WIDTHS[min(kernel.dtype.itemsize, 4)][of_kernel]
    if groups > 1 or channels >= width:  # depthwise: channels are apart anyway, whosever they are
        return 1
    enough = next(n for n in range(1, seeds + 1) if seeds % n == 0 and (n * channels >= width or n == seeds))
    return enough if enough * channels < 4 * width else 1


def _guarded(images: Array, together: int) -> Array:
    """Images of seeds, `together` of which share a dense kernel.

    Between two seeds stands 0, and 0 times a NaN of one would be a NaN of the other. The one that diverged is seen all
    the same: its kernel gradient, of which only the diagonal is taken, has the NaN.
    """
    return images if together == 1 else jnp.where(jnp.isfinite(images), images, 0)


def _fold(array: Array) -> Array:
    """[S, ..., C] -> [..., S C]."""
    return jnp.moveaxis(array, 0, -2).reshape(*array.shape[1:-1], -1)


def _unfold(array: Array, seeds: int) -> Array:
    """[..., S C] -> [S, ..., C]."""
    return jnp.moveaxis(array.reshape(*array.shape[:-1], seeds, -1), -2, 0)


def _diagonal(kernel: Array, together: int) -> Array:
    """[S, k, k, C, F] -> [k, k, together C, S F]: in each group of `together` seeds zero off the diagonal."""
    seeds, size, _, channels, features = kernel.shape
    own = jnp.eye(together, dtype=bool)[:, None, None, :, None]
    grouped = kernel.reshape(seeds // together, together, size, size, channels, features).transpose(2, 3, 4, 0, 1, 5)
    return jnp.where(own, grouped[:, :, None], 0).reshape(size, size, together * channels, seeds * features)


def _from_diagonal(dense: Array, seeds: int, together: int) -> Array:
    """[k, k, together C, S F] -> [S, k, k, C, F]."""
    size, _, channels, features = dense.shape
    grouped = dense.reshape(size, size, together, channels // together, seeds // together, together, features // seeds)
    own = jnp.stack(
        [grouped[:, :, i, :, :, i] for i in range(together)], axis=4
    )  # [k, k, C, S / together, together, F]
    return own.transpose(3, 4, 0, 1, 2, 5).reshape(seeds, size, size, channels // together, features // seeds)
