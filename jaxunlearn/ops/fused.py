"""Convolution of an image that is normalised as it is read, and that leaves the moments of its result: on CPU.

Between a convolution and the next stand BatchNorm and ReLU. As layers of their own they pass over memory nine times in
a training step; here the image stays as the convolution before has written it, `Normalised` says what it stands for,
and the compiled kernels apply that in the cache, in the gradient too. What has no such kernel takes images written out.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxunlearn.ops import native
from jaxunlearn.ops.batching import seedwise
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.finishing import finish, finish_pool
from jaxunlearn.ops.pooling import max_pool


class Convolved(NamedTuple):
    """What `convolve` returns."""

    y: Array  # [B, H, W, F]
    mean: Array  # f32[F], of y over all but the last axis
    var: Array  # f32[F], biased

    @property
    def shape(self) -> tuple[int, ...]:
        return self.y.shape


class Normalised(NamedTuple):
    """Stands for (x - mean) * factor + bias, or max(., 0) of that if `relu`."""

    x: Array  # [B, H, W, C]
    mean: Array  # f32[C]
    factor: Array  # f32[C]
    bias: Array  # f32[C]
    relu: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


Image = Array | Normalised

PLAIN, NORMALISED, POSITIVE = range(3)  # how an image is read: `Reading::Kind` of kernels/images.h


def written(image: Image, residual: Array | None = None) -> Array:
    """The array that `image` stands for; with a `residual`, which is added before ReLU."""
    return finish(*image[:-1], residual, image.relu) if isinstance(image, Normalised) else image


def pooled(image: Image) -> Array:
    """`max_pool` of what `image` stands for."""
    return finish_pool(*image) if isinstance(image, Normalised) else max_pool(image)


def convolve(image: Image, kernel: Array, stride: int, groups: int) -> Convolved | None:
    """`conv2d` of what `image` stands for, and the result's moments; None where no compiled kernel takes it."""
    if isinstance(image, Normalised):
        x, *parameters, relu = image
        reading = POSITIVE if relu else NORMALISED
    else:
        x, reading = image, PLAIN
        parameters = [jnp.zeros(x.shape[-1], kernel.dtype)] * 3
    kind = _kind(x, kernel, stride, groups)
    if kind is None or not native.takes(x, kernel, *parameters):
        return None
    # A network's images, of three channels: too few for a product in bfloat16.
    narrow = x.astype(kernel.dtype) if _few(x) else x
    y, mean, var = _convolve(narrow, *parameters, kernel, stride, groups, reading, kind)
    return Convolved(y.astype(x.dtype), mean, var)


def _few(x: Array) -> bool:
    return x.shape[-1] % 8 != 0


def _kind(x: Array, kernel: Array, stride: int, groups: int) -> str | None:
    """Whose kernels are fastest: the name of a file of `kernels`."""
    size, _, channels, features = kernel.shape
    if groups > 1:
        return "depthwise"
    if features % 8 or (_few(x) and size == 1):
        return None
    if size == 1:
        return "pointwise"
    if size == 3 and stride == 1 and channels % 16 == features % 16 == 0 and x.dtype == jnp.float32:
        return "winograd"
    return "convolution"


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _convolve(
    x: Array, mean: Array, factor: Array, bias: Array, kernel: Array, stride: int, groups: int, reading: int, kind: str
) -> tuple[Array, Array, Array]:
    return _convolve_fwd(x, mean, factor, bias, kernel, stride, groups, reading, kind)[0]


def _convolve_fwd(*arguments: Any) -> tuple[Any, Any]:
    arrays, (stride, groups, reading, kind) = arguments[:5], arguments[5:]
    forward = partial(_forward, stride=stride, groups=groups, reading=reading, kind=kind)
    results = seedwise(forward, *arrays)
    return results, (*arrays, *results[:2])


def _convolve_bwd(stride: int, groups: int, reading: int, kind: str, saved: Any, cotangents: Any) -> tuple[Array, ...]:
    backward = partial(_backward, stride=stride, groups=groups, reading=reading, kind=kind)
    gx, gfactor, gbias, gkernel = seedwise(backward, *saved, *cotangents)
    _, _, factor, *_ = saved
    return gx, -factor * gbias, gfactor, gbias, gkernel


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _forward(*arrays: Array, stride: int, groups: int, reading: int, kind: str) -> tuple[Array, Array, Array]:
    like = partial(_xla_forward, stride=stride, groups=groups, reading=reading)
    return native.call(
        _name(kind, "forward", arrays[0]), *arrays, like=like, shape=(groups,), **_options(stride, reading)
    )


def _backward(*arrays: Array, stride: int, groups: int, reading: int, kind: str) -> tuple[Array, ...]:
    def like(*arrays: Array) -> tuple[Array, ...]:
        *primals, _, _, gy, gmean, gvar = arrays
        forward = partial(_xla_forward, stride=stride, groups=groups, reading=reading)
        gx, _, gfactor, gbias, gkernel = jax.vjp(forward, *primals)[1]((gy, gmean, gvar))
        return gx, gfactor, gbias, gkernel

    options: dict[str, Any] = {"shape": (groups,)} | _options(stride, reading)
    if kind == "convolution" and _few(arrays[0]):
        # A network's images: their gradient is apart, for XLA to leave out where nobody asks for it.
        gx, gfactor, gbias, _ = like(*arrays)
        gkernel = native.call("convolution_kernel_gradient", *arrays, like=lambda *a: like(*a)[3], **options)
        return gx, gfactor, gbias, gkernel
    return native.call(_name(kind, "backward", arrays[0]), *arrays, like=like, **options)


def _name(kind: str, way: str, x: Array) -> str:
    return f"{kind}_{way}_bf16" if x.dtype == jnp.bfloat16 else f"{kind}_{way}"


def _options(stride: int, reading: int) -> dict[str, Any]:
    return {"stride": np.int64(stride), "reading": np.int64(reading)}


def _xla_forward(
    x: Array, mean: Array, factor: Array, bias: Array, kernel: Array, *, stride: int, groups: int, reading: int
) -> tuple[Array, Array, Array]:
    image = written(Normalised(x, mean, factor, bias, reading == POSITIVE)) if reading else x
    y = conv2d(image, kernel.astype(x.dtype), stride, groups)
    y32 = y.astype(kernel.dtype)
    mean = y32.mean((0, 1, 2))
    return y, mean, jnp.square(y32 - mean).mean((0, 1, 2))
