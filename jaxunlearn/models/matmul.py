"""The matrix product that kernel gradients are made of."""

from jax import Array, lax


def product_over_rows(x: Array, g: Array) -> Array:
    """[..., C], [..., F] -> [C, F]. Not as [F, C] transposed, for which XLA copies `g`: 8 GFLOP/s instead of 160."""
    rows = ((0,), (0,))
    return lax.dot_general(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (rows, ((), ())))
