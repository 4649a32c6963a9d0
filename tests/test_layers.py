"""Layers against lax's convolution, numpy, and PyTorch's definitions: values, gradients, and under vmap over seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxunlearn.models.convolution import conv2d


def random(*shape: int, seed: int = 0, dtype: type = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def reference_conv(x, kernel, stride, groups):
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )


def value_and_gradients(conv, x, kernel, weight):
    y, pull = jax.vjp(conv, x, kernel)
    return y, *pull(weight)


# batch, height, width, channels, features, kernel, stride, groups
CONVOLUTIONS = [
    (4, 8, 8, 3, 16, 3, 1, 1),  # stem
    (4, 8, 8, 16, 16, 3, 1, 1),
    (4, 8, 8, 16, 32, 3, 2, 1),
    (3, 7, 5, 20, 24, 3, 2, 1),  # odd and oblong
    (3, 5, 7, 20, 24, 3, 1, 1),
    (3, 4, 4, 20, 24, 3, 1, 1),
    (3, 2, 2, 20, 24, 3, 1, 1),
    (3, 2, 2, 20, 24, 3, 2, 1),
    (3, 1, 1, 20, 24, 3, 1, 1),
    (1, 6, 6, 4, 20, 5, 1, 1),
    (3, 6, 6, 20, 24, 1, 1, 1),
    (3, 7, 7, 20, 24, 1, 2, 1),
    (4, 6, 6, 20, 20, 3, 1, 20),  # depthwise
    (32, 6, 6, 20, 20, 3, 2, 20),
    (3, 7, 5, 20, 20, 3, 2, 20),
    (3, 2, 2, 20, 20, 3, 2, 20),
    (2, 7, 7, 6, 6, 5, 2, 6),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution_and_gradients_are_those_of_lax(shape):
    batch, height, width, channels, features, size, stride, groups = shape
    x, kernel = random(batch, height, width, channels), random(size, size, channels // groups, features, seed=1)
    weight = random(*jax.eval_shape(lambda: reference_conv(x, kernel, stride, groups)).shape, seed=2)
    ours = jax.jit(lambda *a: value_and_gradients(lambda x, k: conv2d(x, k, stride, groups), *a))(x, kernel, weight)
    expected = jax.jit(lambda *a: value_and_gradients(lambda x, k: reference_conv(x, k, stride, groups), *a))(
        x, kernel, weight
    )
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))
