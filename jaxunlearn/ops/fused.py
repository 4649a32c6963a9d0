"""Convolution of an image that is normalised as it is read, and that leaves the moments of its result: on CPU.

Between a convolution and the next stand BatchNorm and ReLU. As layers of their own they pass over memory nine times in
a training step; here the image stays as the convolution before has written it, `Normalised` says what it stands for,
and the compiled kernels apply that in the cache, in the gradient too. What has no such kernel takes images written out.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxunlearn.ops import native
from jaxunlearn.ops.batching import seedwise
from jaxunlearn.ops.blocks import lax_conv
from jaxunlearn.ops.convolution import has_own_forms, input_gradient
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


@partial(jax.tree_util.register_dataclass, data_fields=("x", "mean", "factor", "bias"), meta_fields=("relu",))
@dataclass(frozen=True)
class Normalised:
    """Stands for (x - mean) * factor + bias, or max(., 0) of that if `relu`.

    Under `jit`, `checkpoint` and the like `relu` stays what it is.
    """

    x: Array  # [B, H, W, C]
    mean: Array  # f32[C]
    factor: Array  # f32[C]
    bias: Array  # f32[C]
    relu: bool

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        return self.x, self.mean, self.factor, self.bias

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


Image = Array | Normalised

PLAIN, NORMALISED, POSITIVE = range(3)  # how an image is read: `Reading` of kernels/images.h


def written(image: Image, residual: Array | None = None) -> Array:
    """The array that `image` stands for; with a `residual`, which is added before ReLU."""
    return finish(*image.arrays, residual, image.relu) if isinstance(image, Normalised) else image


def pooled(image: Image) -> Array:
    """`max_pool` of what `image` stands for."""
    return finish_pool(*image.arrays, image.relu) if isinstance(image, Normalised) else max_pool(image)


def convolve(image: Image, kernel: Array, stride: int, groups: int) -> Convolved | None:
    """`conv2d` of what `image` stands for, and the result's moments; None where no compiled kernel takes it."""
    if isinstance(image, Normalised):
        x, *parameters = image.arrays
        reading = POSITIVE if image.relu else NORMALISED
    else:
        x, reading = image, PLAIN
        parameters = [jnp.zeros(x.shape[-1], jnp.float32)] * 3
    kind = _kind(x, kernel, stride, groups, reading)
    if kind is None or not native.takes(x, kernel, *parameters):
        return None
    if kind != "depthwise" and x.dtype == jnp.bfloat16 and not _few(x) and native.has_tiles():
        kind = "tiles"
    # A network's images, of three channels: too few for a product in bfloat16.
    narrow = x.astype(kernel.dtype) if _few(x) else x
    y, mean, var = _convolve(narrow, *parameters, kernel, stride, groups, reading, kind)
    return Convolved(y.astype(x.dtype), mean, var)


def _few(x: Array) -> bool:
    return x.shape[-1] % 8 != 0


def _kind(x: Array, kernel: Array, stride: int, groups: int, reading: int) -> str | None:
    """Whose kernels are fastest: the name of a file of `kernels`; None where none takes the shape."""
    size, _, channels, features = kernel.shape
    if not has_own_forms(kernel, groups):
        return None
    if groups > 1:
        return "depthwise"
    if features % 8 or (_few(x) and (reading != PLAIN or size == 1)):
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
    like = partial(_plain_forward, stride=stride, groups=groups, reading=reading)
    return native.call(
        _name(kind, "forward", arrays[0]), *arrays, like=like, shape=(groups,), **_options(stride, reading)
    )


def _backward(*arrays: Array, stride: int, groups: int, reading: int, kind: str) -> tuple[Array, ...]:
    def like(*arrays: Array) -> tuple[Array, ...]:
        *primals, _, _, gy, gmean, gvar = arrays
        forward = partial(_plain_forward, stride=stride, groups=groups, reading=reading)
        gx, _, gfactor, gbias, gkernel = jax.vjp(forward, *primals)[1]((gy, gmean, gvar))
        return gx, gfactor, gbias, gkernel

    options: dict[str, Any] = {"shape": (groups,)} | _options(stride, reading)
    x, _, factor, _, kernel, y, ymean, gy, gmean, gvar = arrays
    if kind == "convolution" and _few(x):
        # A network's images: their gradient is apart, for XLA to leave out where nobody asks for it.
        count = y.size // y.shape[-1]
        gx = input_gradient(x, kernel, gy + (gmean + 2 * gvar * (y - ymean)) / count, stride, groups)
        gkernel = native.call("convolution_kernel_gradient", *arrays, like=lambda *arrays: like(*arrays)[3], **options)
        return gx, jnp.zeros_like(factor), jnp.zeros_like(factor), gkernel
    return native.call(_name(kind, "backward", x), *arrays, like=like, **options)


def _name(kind: str, way: str, x: Array) -> str:
    return f"{kind}_{way}_bf16" if x.dtype == jnp.bfloat16 else f"{kind}_{way}"


def _options(stride: int, reading: int) -> dict[str, Any]:
    return {"stride": np.int64(stride), "reading": np.int64(reading)}


def _plain_forward(
    x: Array, mean: Array, factor: Array, bias: Array, kernel: Array, *, stride: int, groups: int, reading: int
) -> tuple[Array, Array, Array]:
    """Without derivative rules of its own, since derivatives of the gradients are taken of it."""
    if reading:
        z = (x.astype(factor.dtype) - mean) * factor + bias
        x = (jax.nn.relu(z) if reading == POSITIVE else z).astype(x.dtype)
    y = lax_conv(x, kernel.astype(x.dtype), stride, groups)
    wide = y.astype(kernel.dtype)
    mean = wide.mean((0, 1, 2))
    return y, mean, jnp.square(wide - mean).mean((0, 1, 2))
