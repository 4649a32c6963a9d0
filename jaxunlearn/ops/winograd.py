"""3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 2.25 times fewer multiplications.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4.1. A 2x2 tile of the
output is A^T [(G k G^T) * (B^T d B)] A, with d the 4x4 tile of the input under it. The product in the middle is over
channels too: sixteen matrix products, which run at the CPU's full rate on all its cores, where XLA's convolution leaves
all but one idle if there are 64 features or fewer. In float32 the error is at most three times that of the direct sum.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxunlearn.ops.batching import outlined
from jaxunlearn.ops.reductions import product_over_rows

# What the sixteen parts of a chunk of images take, so that they stay in the cache between the transforms and the
# products. Two cores, 128 images, 64 channels of 32x32: 29 ms in chunks of 8 MiB, 36 of 4, 31 of 32, 48 by XLA's
# convolution; 128 of 16x16: 21, 30, 24, 27; 256 of 8x8: 16, 18, 18, 23; 512 of 4x4: 14, 15, 14, 26.
CHUNK_BYTES = 2**23


def forward(x: Array, kernel: Array) -> Array:
    """[B, H, W, C], [3, 3, C, F] -> [B, H, W, F], padded by one pixel of zeros on every side."""
    return _convolve(x, outlined(partial(_both_ways, _kernel_parts), kernel))


def input_gradient(g: Array, kernel: Array) -> Array:
    """The same of `g` with the kernel turned by half a circle, its channels and features exchanged."""
    # The transposition apart, and turned after it: 0.6 ms for 512 channels; in one 2.6.
    exchanged = outlined(lambda kernel: kernel.transpose(0, 1, 3, 2), kernel)
    return _convolve(g, outlined(lambda kernel: _both_ways(_kernel_parts, kernel[::-1, ::-1]), exchanged))


def _convolve(x: Array, kernel_parts: list[list[Array]]) -> Array:
    height, width, channels, features = *x.shape[1:], kernel_parts[0][0].shape[-1]
    down, along = math.ceil(height / 2), math.ceil(width / 2)

    def chunk(x: Array) -> Array:
        def product(data: Array, part: Array) -> Array:
            return jnp.dot(data.reshape(-1, channels), part).reshape(len(x), down, along, features)

        corners = outlined(partial(_both_ways, _output_parts), _each(product, _input_parts(x), kernel_parts))
        tiles = jnp.stack([jnp.stack(row, axis=3) for row in corners], axis=2)
        return tiles.reshape(len(x), 2 * down, 2 * along, features)[:, :height, :width]

    images = max(1, CHUNK_BYTES // (16 * down * along * max(channels, features) * x.dtype.itemsize))
    return _by_chunks(chunk, x, images)


def kernel_gradient(x: Array, g: Array) -> Array:
    """Of the convolution of `x` with output gradient `g`: G^T [sum over tiles of (B^T d B)^T (A g A^T)] G."""
    g = jnp.pad(g, ((0, 0), (0, g.shape[1] % 2), (0, g.shape[2] % 2), (0, 0)))

    def gradient_parts(g: Array) -> list[list[Array]]:
        return _both_ways(_gradient_parts, [[g[:, i::2, j::2] for j in range(2)] for i in range(2)])

    products = _each(product_over_rows, _input_parts(x), outlined(gradient_parts, g))
    taps = outlined(partial(_both_ways, _kernel_gradient_parts), products)
    return jnp.stack([jnp.stack(row) for row in taps])


def _by_chunks(function: Callable[[Array], Array], x: Array, images: int) -> Array:
    """`function(x)`, so many images at a time, one after the other."""
    count, rest = divmod(len(x), images)
    if count + bool(rest) == 1:
        return function(x)
    whole, left = x[: count * images], x[count * images :]
    mapped = lax.map(function, whole.reshape(count, images, *x.shape[1:]))
    joined = mapped.reshape(count * images, *mapped.shape[2:])
    return jnp.concatenate([joined, function(left)]) if rest else joined


def _each(function: Callable[[Array, Array], Array], first: list[list[Array]], second: list[list[Array]]) -> Any:
    """`function` of every two arrays that have the same place in two grids."""
    return [[function(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def _both_ways(transform: Callable[[Any], list[Array]], grid: Any) -> list[list[Array]]:
    """`transform` of every column of a grid of arrays, then of every row."""
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


def _input_parts(x: Array) -> list[list[Array]]:
    """B^T d B of every tile: 4 x 4 of [B, tiles down, tiles along, C]."""
    down, along = (math.ceil(n / 2) for n in x.shape[1:3])
    # Outlined: fused into the sums, the padding would be a branch at every element.
    padded = outlined(lambda x: jnp.pad(x, ((0, 0), (1, 1 + x.shape[1] % 2), (1, 1 + x.shape[2] % 2), (0, 0))), x)

    def transform(d: Sequence[Array]) -> list[Array]:
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]

    def parts(padded: Array) -> list[list[Array]]:
        rows = transform([padded[:, i : i + 2 * down - 1 : 2] for i in range(4)])
        return [transform([row[:, :, j : j + 2 * along - 1 : 2] for j in range(4)]) for row in rows]

    return outlined(parts, padded)


def _kernel_parts(k: Sequence[Array]) -> list[Array]:
    """G, along one direction: 3 to 4."""
    ends, middle = (k[0] + k[2]) / 2, k[1] / 2
    return [k[0], ends + middle, ends - middle, k[2]]


def _output_parts(m: Sequence[Array]) -> list[Array]:
    """A^T, along one direction: 4 to 2."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _gradient_parts(g: Sequence[Array]) -> list[Array]:
    """A, along one direction: 2 to 4."""
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]


def _kernel_gradient_parts(u: Sequence[Array]) -> list[Array]:
    """G^T, along one direction: 4 to 3."""
    ends, middle = (u[1] + u[2]) / 2, (u[1] - u[2]) / 2
    return [u[0] + ends, middle, ends + u[3]]
