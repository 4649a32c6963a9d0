"""Layers with PyTorch's semantics: convolution, BatchNorm, linear.

Images are NHWC, kernels HWIO. Every layer has a compute dtype; parameters and BatchNorm statistics are held in float32
(float64 when the compute dtype is float64), whatever the compute dtype.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.fused import Convolved, Image, Normalised, convolve, written
from jaxunlearn.ops.normalization import EPS, batch_norm

BATCH_NORM_MOMENTUM = 0.1  # PyTorch's sense: new = 0.9 * old + 0.1 * batch

SHAPE_ONLY = nn.initializers.zeros_init()  # of kernels, whose initial values `initialisation` draws all at once


def parameter_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Dtype in which parameters, statistics and logits are held: at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


class Conv(nn.Module):
    """Bias-free convolution: [B, H, W, channels] -> [B, ceil(H / stride), ceil(W / stride), features], as `conv2d`.

    With `moments` the result is `Convolved` where a compiled kernel makes it.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Image, moments: bool = False) -> Array | Convolved:
        if not isinstance(image, Normalised) or image.x.dtype != self.dtype:
            image = written(image).astype(self.dtype)
        shape = (self.kernel_size, self.kernel_size, image.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", SHAPE_ONLY, shape, parameter_dtype(self.dtype))
        convolved = convolve(image, kernel, self.stride, self.groups)
        if convolved is None:
            return conv2d(written(image), kernel.astype(self.dtype), self.stride, self.groups)
        return convolved if moments else convolved.y


class Linear(nn.Module):
    """Affine layer: [..., in] -> [..., features]."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        held = parameter_dtype(self.dtype)
        kernel = self.param("kernel", SHAPE_ONLY, (x.shape[-1], self.features), held)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), held)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as `torch.nn.BatchNorm2d`; then residual sum and ReLU if asked.

    In train mode normalises by the biased variance of the batch and moves the running statistics towards the batch's
    mean and *unbiased* variance; in eval mode normalises by the running statistics. Variables: params `scale`, `bias`;
    batch_stats `mean`, `var`; each [channels].

    Without `write` the result may be `Normalised`.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array | Convolved,
        train: bool,
        relu: bool = False,
        residual: Array | None = None,
        write: bool = True,
    ) -> Image:
        held = parameter_dtype(self.dtype)
        array, *moments = x if isinstance(x, Convolved) else (x,)
        array = array.astype(self.dtype)
        shape = (array.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape, held)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, held)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, held)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, held)
        mean, var = running_mean.value, running_var.value
        if train:
            y, *batch = (array, *moments) if moments else batch_norm(array, scale, bias, residual, mean, relu)
            if not self.is_initializing():
                count = array.size // array.shape[-1]
                keep, move = 1 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM
                running_mean.value = keep * mean + move * batch[0]
                running_var.value = keep * var + move * (count / max(count - 1, 1)) * batch[1]
            if not moments:
                return y
            mean, var = batch
        image = Normalised(array, mean, scale * lax.rsqrt(var + EPS), bias, relu)
        return written(image, residual) if write or residual is not None or not moments else image


def conv_norm(
    conv: Conv, norm: BatchNorm, image: Image, train: bool, relu: bool = False, residual: Array | None = None
) -> Image:
    """`norm` of `conv` of an image, with residual sum and ReLU.

    On CPU the result may be `Normalised`: another `conv_norm` reads it as it is, anything else takes what `written`
    makes of it.
    """
    return norm(conv(image, moments=True), train, relu=relu, residual=residual, write=False)
