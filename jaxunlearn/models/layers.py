"""Layers with PyTorch's semantics: convolution chosen by shape, BatchNorm, linear, pooling.

Images are NHWC, kernels HWIO. Every layer has a compute dtype; parameters and BatchNorm statistics are held in float32
(float64 when the compute dtype is float64), whatever the compute dtype.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # PyTorch's sense: new = 0.9 * old + 0.1 * batch


def parameter_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Dtype in which parameters, statistics and logits are held: at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


def conv2d(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """2-d convolution (cross-correlation) padded by k // 2 on every side, as PyTorch's `padding=k//2`.

    Args:
      x: [batch, height, width, channels].
      kernel: [k, k, channels / groups, features], k odd.
      stride: same in both directions.
      groups: 1, or `channels` for a depthwise convolution.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), features], in the dtype of `x`.
    """
    size = kernel.shape[0]
    if jax.default_backend() == "cpu":
        if size == 1 and groups == 1:
            return jnp.dot(x[:, ::stride, ::stride], kernel[0, 0])
        if groups > 1 and groups == x.shape[-1] == kernel.shape[-1]:
            return _depthwise(x, kernel, stride)
        if x.shape[1] <= 2:
            return _im2col(x, kernel, stride)
    return _lax_conv(x, kernel, stride, groups)


def _lax_conv(x: Array, kernel: Array, stride: int, groups: int) -> Array:
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


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    size = kernel.shape[0]
    taps = kernel.reshape(size * size, kernel.shape[-1])
    windows = _windows(x, size, stride)
    total = windows[0] * taps[0]
    for window, tap in zip(windows[1:], taps[1:], strict=True):
        total = total + window * tap
    return total


def max_pool(x: Array) -> Array:
    """2x2 max-pool with stride 2: [B, H, W, C] -> [B, H / 2, W / 2, C], H and W even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class Conv(nn.Module):
    """Bias-free convolution, Kaiming-normal (fan_out, ReLU gain) initialisation.

    As in PyTorch, fan_out is k * k * features also for a depthwise convolution (groups are ignored).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, shape, parameter_dtype(self.dtype))
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.groups)


class Linear(nn.Module):
    """Affine layer, Kaiming-normal (fan_in, ReLU gain) kernel and zero bias: [..., in] -> [..., features]."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        held = parameter_dtype(self.dtype)
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), held)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), held)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as `torch.nn.BatchNorm2d`, optionally followed by ReLU.

    In train mode normalises by the biased variance of the batch and moves the running statistics towards the batch's
    mean and *unbiased* variance; in eval mode normalises by the running statistics. Variables: params `scale`, `bias`;
    batch_stats `mean`, `var`; each [channels].
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool, relu: bool = False) -> Array:
        held = parameter_dtype(self.dtype)
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape, held)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, held)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, held)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, held)
        x = x.astype(held)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.square(x - mean).mean(axes)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                keep, move = 1 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM
                running_mean.value = keep * running_mean.value + move * mean
                running_var.value = keep * running_var.value + move * (count / max(count - 1, 1)) * var
        else:
            mean, var = running_mean.value, running_var.value
        y = (x - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPS)) + bias
        return (nn.relu(y) if relu else y).astype(self.dtype)
