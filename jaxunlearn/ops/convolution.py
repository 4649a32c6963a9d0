"""2-d convolution and its two gradients, each in the form that is fastest for its shape and platform.

The choice is made in `_forward`, `input_gradient` and `_kernel_gradient` below and nowhere else. GPU and TPU always
take `lax.conv_general_dilated`; several seeds there are `blocks`. The milliseconds in the comments are of one core
(AVX-512) where they do not say two, batch 128, float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxunlearn.ops import blocks, depthwise, winograd
from jaxunlearn.ops.batching import on_cpu, seedwise
from jaxunlearn.ops.blocks import lax_conv
from jaxunlearn.ops.reductions import product_over_rows

_NHWC = ("NHWC", "HWIO", "NHWC")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """2-d convolution (cross-correlation) padded by k // 2 on every side, as PyTorch's `padding=k//2`.

    Args:
      x: [batch, height, width, channels].
      kernel: [k, k, channels / groups, features].
      stride: same in both directions.
      groups: 1, `channels` for a depthwise convolution, or any that divides channels and features.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), features], in the dtype of `x`. With an even k images grow by
      a pixel before they are strided, as PyTorch's do.
    """
    return _conv2d_fwd(x, kernel, stride, groups)[0]


def _conv2d_fwd(x: Array, kernel: Array, stride: int, groups: int) -> tuple[Array, tuple[Array, Array]]:
    of: dict[str, Any] = {"stride": stride, "groups": groups}
    return seedwise(partial(_forward, **of), x, kernel, together=partial(blocks.forward, **of)), (x, kernel)


def _conv2d_bwd(stride: int, groups: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    of: dict[str, Any] = {"stride": stride, "groups": groups}
    arrays = (*saved, g)
    dx = seedwise(partial(input_gradient, **of), *arrays, together=partial(blocks.input_gradient, **of))
    dkernel = seedwise(partial(_kernel_gradient, **of), *arrays, together=partial(blocks.kernel_gradient, **of))
    return dx, dkernel


conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


def has_own_forms(kernel: Array, groups: int) -> bool:
    """Whether anything but XLA's form is made for such a kernel: on a CPU, an odd one, of one group or depthwise."""
    size, _, channels, features = kernel.shape
    return on_cpu() and size % 2 == 1 and (groups == 1 or (channels == 1 and features == groups))


def _forward(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    if has_own_forms(kernel, groups):
        if groups > 1:
            return depthwise.forward(x, kernel, stride)
        if kernel.shape[0] == 1:
            # With both gradients, 24 to 144 channels of 32x32: 25 ms against 83; 64 to 384 of 8x8: 5 against 16.
            return jnp.dot(x[:, ::stride, ::stride], kernel[0, 0])
        if _is_wide(kernel, stride):
            # Two cores: 64 channels of 32x32: 30 ms against 48; 128 of 16x16: 22, 27; 256 of 8x8: 16, 23; 512 of 4x4:
            # 14, 26; of 2x2: 5, 6.3 as below. With 32 channels of 16x16 it would be 2.9 against 2.5.
            return winograd.forward(x, kernel)
        if x.shape[1] <= 2:
            # XLA takes the kernel for the image here and misses the fast path. 512 channels, with both gradients: 35 ms
            # against 2,957. On 4x4 images they are equal.
            return _im2col(x, kernel, stride)
    return lax_conv(x, kernel, stride, groups)


def input_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    """Of `conv2d`, from the gradient `g` of its result."""
    if has_own_forms(kernel, groups):
        if groups > 1:
            return depthwise.input_gradient(g, kernel, x.shape[1:3], stride)
        if _is_wide(kernel, stride):
            return winograd.input_gradient(g, kernel)
        if kernel.shape[0] > 1 and x.shape[1] > 2:
            return _spread_conv(g, _turned(kernel), x.shape[1:3], stride)
    return jax.linear_transpose(lambda x: _forward(x, kernel, stride, groups), x)(g)[0]


def _kernel_gradient(x: Array, kernel: Array, g: Array, stride: int, groups: int) -> Array:
    size = kernel.shape[0]
    if has_own_forms(kernel, groups):
        if groups > 1:
            return depthwise.kernel_gradient(x, g, size, stride)
        if size == 1:
            return product_over_rows(x[:, ::stride, ::stride], g)[None, None]
        if _is_wide(kernel, stride) and x.shape[1] <= 8:
            # Two cores: 256 channels of 8x8: 19 ms against 27; 512 of 4x4: 16, 23; of 2x2: 4.3, 7.6; 64 of 8x8 the
            # same; 128 of 16x16: 39, 30.
            return winograd.kernel_gradient(x, g)
        if x.shape[1] > 2:
            return _kernel_gradient_conv(x, g, size, stride)
    return jax.linear_transpose(lambda kernel: _forward(x, kernel, stride, groups), kernel)(g)[0]


def _is_wide(kernel: Array, stride: int) -> bool:
    """Whether there are channels enough for matrix products to pay for Winograd's transforms."""
    size, _, *channels = kernel.shape
    return size == 3 and stride == 1 and min(channels) >= 64 and kernel.dtype.itemsize >= 4


def _turned(kernel: Array) -> Array:
    """By half a circle, channels and features exchanged."""
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _spread_conv(g: Array, turned: Array, shape: tuple[int, ...], stride: int) -> Array:
    """The input gradient: the convolution of `g`, spread out by `stride`, with the turned kernel.

    Written out because XLA brings a convolution to the layout of the CPU's fast path in the entry computation only:
    lax's own gradient, in another layout, is 9 times slower inside `lax.scan` and `lax.cond`.
    """
    size = turned.shape[0]
    low = size - 1 - size // 2
    padding = [(low, n + size - 2 - low - (m - 1) * stride) for n, m in zip(shape, g.shape[1:3], strict=True)]
    return lax.conv_general_dilated(
        g,
        turned,
        (1, 1),
        padding,
        lhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )


def _kernel_gradient_conv(x: Array, g: Array, size: int, stride: int) -> Array:
    """The convolution of `x` with `g` as the kernel, where channels are the batch and images the channels.

    With more than 16 features both rows and taps are spread out by 2, which changes nothing but keeps XLA from handing
    the convolution to YNNPACK, slow at kernels as large as the image. 64 features on 32x32 images: 69 ms against 181;
    128 on 16x16: 54 against 104; 512 on 4x4: 47 against 71; 32 on 16x16: 4.8 against 7.1; but 16 on 32x32: 9.3, 8.7.
    """
    spread = 2 if max(x.shape[3], g.shape[3]) > 16 else 1
    pad = size // 2
    above, left = pad * spread, pad
    below, right = (size - pad - n + (m - 1) * stride for n, m in zip(x.shape[1:3], g.shape[1:3], strict=True))
    out = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (spread, 1),
        [(above, below * spread), (left, right)],
        lhs_dilation=(spread, 1),
        rhs_dilation=(spread * stride, stride),
        dimension_numbers=_NHWC,
    )
    return out.transpose(1, 2, 0, 3)


def _windows(x: Array, size: int, stride: int) -> list[Array]:
    """The size * size shifted views of the padded image, each of the output's height and width, row by row."""
    pad = size // 2
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [
        padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]


def _im2col(x: Array, kernel: Array, stride: int) -> Array:
    size, _, channels, features = kernel.shape
    columns = jnp.concatenate(_windows(x, size, stride), axis=-1)
    return jnp.dot(columns, kernel.reshape(size * size * channels, features))
