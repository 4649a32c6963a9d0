"""Batch normalisation with PyTorch's semantics and a closed-form gradient; ReLU and the residual sum included."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxunlearn.ops.batching import on_cpu, outlined, seedwise
from jaxunlearn.ops.reductions import sum_over_rows

EPS = 1e-5


def _sum(terms: Callable[..., Array], *arrays: Array) -> Array:
    """Sum of `terms(*arrays)` over all axes but the last, on CPU."""
    # Eight groups of images: 144 channels of 32x32, one core, forward 12 ms against 15 for plain sums, gradient 25, 28;
    # 16 channels 1.2, 1.5 and 2.7, 3.3.
    return sum_over_rows(terms, *arrays, groups=8)


def _sums(*arrays: Array) -> tuple[Array, ...]:
    """Of each array, all of one shape, over all axes but the last; on GPU and TPU.

    One reduction of all: XLA makes two kernels of it, where it makes one and a small one each of plain sums.
    """
    zeros = tuple(jnp.zeros((), array.dtype) for array in arrays)
    axes = tuple(range(arrays[0].ndim - 1))
    return lax.reduce(arrays, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), axes)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def batch_norm(
    x: Array, scale: Array, bias: Array, residual: Array | None, near: Array, relu: bool
) -> tuple[Array, Array, Array]:
    """Normalise by the batch's mean and biased variance, then scale, shift, add `residual`, apply ReLU.

    Args:
      x: [..., channels], any float dtype; statistics are computed in the dtype of `scale`.
      scale, bias: [channels], float32 or wider.
      residual: like `x`, or None.
      near: [channels], near the batch's mean, such as the running one; the result does not depend on it but by
        rounding: on GPU and TPU the sums are of what is left of `x` without it.
      relu: whether to end with max(., 0).

    Returns:
      The result in the dtype of `x`, and the batch's mean and biased variance, each [channels].
    """
    return _batch_norm_fwd(x, scale, bias, residual, near, relu)[0]


def _forward(
    x: Array, scale: Array, bias: Array, residual: Array | None = None, near: Array | None = None, *, relu: bool
) -> tuple[Array, Array, Array]:
    count = x.size // x.shape[-1]
    axes = tuple(range(x.ndim - 1))
    x32 = x.astype(scale.dtype)
    if near is None:
        mean = x32.sum(axes) / count
        # Two passes: E[x^2] - E[x]^2 would cancel where |mean| is large against the deviation.
        var = _sum(lambda x: jnp.square(x - mean), x32) / count
    else:
        # One pass, which is one kernel. What cancels is only what the mean has moved away from `near`.
        left = x32 - near
        moved, squares = (total / count for total in _sums(left, jnp.square(left)))
        mean = near + moved
        var = jnp.maximum(squares - jnp.square(moved), 0)
    std = lax.sqrt(var + EPS)
    shift = bias if residual is None else bias + residual.astype(scale.dtype)
    y = (x32 - mean) * (scale / std) + shift
    if relu:
        y = jnp.maximum(y, jnp.zeros_like(y))
    return y.astype(x.dtype), mean, var


def _batch_norm_fwd(
    x: Array, scale: Array, bias: Array, residual: Array | None, near: Array, relu: bool
) -> tuple[tuple[Array, Array, Array], Any]:
    if on_cpu():
        arrays = (x, scale, bias) if residual is None else (x, scale, bias, residual)
        y, mean, var = seedwise(partial(outlined, partial(_forward, relu=relu)), *arrays)
    else:
        y, mean, var = _forward(x, scale, bias, residual, near, relu=relu)
    return (y, mean, var), (x, y, scale, mean, var, residual is None)


def _batch_norm_bwd(
    relu: bool, saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array | None, None]:
    x, y, scale, mean, var, alone = saved
    backward = partial(outlined, partial(_backward, relu=relu, alone=alone))
    dx, dscale, dbias, dresidual = seedwise(backward, x, y, scale, mean, var, *cotangents)
    return dx, dscale, dbias, dresidual, None


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def _backward(
    x: Array,
    y: Array,
    scale: Array,
    mean: Array,
    var: Array,
    g: Array,
    dmean: Array,
    dvar: Array,
    *,
    relu: bool,
    alone: bool,
) -> tuple[Array, Array, Array, Array | None]:
    count = x.size // x.shape[-1]
    axes = tuple(range(x.ndim - 1))
    std = lax.sqrt(var + EPS)
    centred = x.astype(scale.dtype) - mean
    g = g.astype(scale.dtype)
    if relu:
        g = outlined(lambda y, g: lax.select(y > 0, g, jnp.zeros_like(g)), y, g)
    if on_cpu():
        dbias, products = g.sum(axes), _sum(jnp.multiply, g, centred)
    else:
        dbias, products = _sums(g, g * centred)
    dscale = products / std
    # x reaches the output directly, through the mean and through the variance (Ioffe & Szegedy, section 3).
    direct = scale / std
    along = (2 * dvar - direct * dscale / std) / count
    constant = (dmean - direct * dbias) / count
    dx = g * direct + centred * along + constant
    return dx.astype(x.dtype), dscale, dbias, None if alone else g.astype(x.dtype)
