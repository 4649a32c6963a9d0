"""Normalised images written out, as they are and max-pooled: against JAX's own derivatives of the plain formula."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_layers import HESSIAN_PRODUCTS, assert_close, random

from jaxunlearn.ops import native
from jaxunlearn.ops.finishing import finish, finish_pool

pytestmark = [pytest.mark.numbers, pytest.mark.usefixtures("quick_compilation")]

SHAPES = [(3, 5, 7, 24), (2, 3, 2, 5), (33, 9, 8, 40)]  # vectors over pixels, hardly one, several chunks
DTYPES = [jnp.float32, jnp.bfloat16]
CASES = [*itertools.product(("finish", "add"), (False, True)), ("pool", False), ("pool", True)]


def plain(x, mean, factor, bias, residual, relu):
    z = (x.astype(factor.dtype) - mean) * factor + bias
    z = z if residual is None else z + residual.astype(z.dtype)
    return jax.nn.relu(z) if relu else z


def plain_pool(x, mean, factor, bias, relu):
    z = plain(x, mean, factor, bias, None, False)
    y = lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.nn.relu(y) if relu else y


def parameters(channels, *seeds):
    """Mean, factor of both signs, bias."""
    return (
        0.3 + random(*seeds, channels, seed=1) / 8,
        random(*seeds, channels, seed=2),
        random(*seeds, channels, seed=3),
    )


def case(kind, relu, ours):
    """The function of (x, mean, factor, bias, residual) that one of `CASES` names."""
    whole, pooled = (finish, finish_pool) if ours else (plain, plain_pool)
    if kind == "pool":
        return lambda *arrays: pooled(*arrays[:4], relu)
    return lambda *arrays: whole(*arrays[:4], arrays[4] if kind == "add" else None, relu)


def images(shape, dtype):
    """x, residual, the gradient with respect to the result and to the pooled one."""
    batch, height, width, channels = shape
    shapes = (shape, shape, shape, (batch, height // 2, width // 2, channels))
    return tuple(random(*shape, seed=seed).astype(dtype) for seed, shape in enumerate(shapes, 4))


def values_and_gradients(ours, x, residual, g, pooled_g, *others):
    results = []
    for kind, relu in CASES:
        y, pull = jax.vjp(case(kind, relu, ours), x, *others, residual)
        results.append((y, *pull(pooled_g if kind == "pool" else g)))
    return results


reference = jax.jit(partial(values_and_gradients, False))


def assert_right(shape, dtype):
    arrays, others = images(shape, dtype), parameters(shape[-1])
    got = jax.jit(partial(values_and_gradients, True))(*arrays, *others)
    want = reference(*(array.astype(jnp.float32) for array in arrays), *others)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == (dtype if mine.ndim == 4 else jnp.float32)
        # bfloat16 has eight bits: off by half of the last one, or by all of it where float32 is on the other side.
        rtol, atol = 2.0**-8 if mine.dtype == jnp.bfloat16 else 0, 2e-6 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol, atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_formula(shape, dtype):
    assert_right(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_values_and_gradients_are_right_without_a_compiler(dtype, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert_right(SHAPES[0], dtype)


def test_seeds_together_have_the_bits_of_each_alone():
    x, residual = (random(2, 3, 5, 4, 20, seed=seed) for seed in (4, 5))
    arrays = (x, *parameters(20, 2), residual)

    def loss(*arrays):
        return sum(jnp.square(case(kind, True, True)(*arrays)).sum() for kind in ("finish", "add", "pool"))

    every = tuple(range(5))
    alone = jax.jit(jax.grad(loss, every))
    each = [alone(*(array[i] for array in arrays)) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    inside = jax.jit(jax.vmap(jax.grad(loss, every)))(*arrays)
    outside = jax.jit(jax.grad(lambda *arrays: jax.vmap(loss)(*arrays).sum(), every))(*arrays)
    for got in (inside, outside):
        jax.tree.map(np.testing.assert_array_equal, got, stacked)


@pytest.mark.parametrize("relu", [False, True])
def test_of_equal_maxima_the_first_takes_the_gradient_unless_relu_stopped_it(relu, form):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 7, 5, 21)).astype(np.float32))
    mean, factor, bias = parameters(21)
    g = random(3, 3, 2, 21)
    y, pull = jax.vjp(lambda x: finish_pool(x, mean, factor, bias, relu), x)
    (got,) = pull(g)
    y, g, factors, z = (np.asarray(array) for array in (y, g, factor, plain(x, mean, factor, bias, None, False)))
    gx = np.zeros(x.shape, np.float32)
    for b, i, j, c in np.ndindex(g.shape):
        window = z[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        assert abs(y[b, i, j, c] - (max(window.max(), 0) if relu else window.max())) < 1e-6
        row, column = np.unravel_index(window.argmax(), (2, 2))
        if not relu or window.max() > 0:
            gx[b, 2 * i + row, 2 * j + column, c] = g[b, i, j, c] * factors[c]
    np.testing.assert_array_equal(got, gx)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_nan_stays_nan_and_where_it_is(dtype, form):
    x = np.array(random(4, 4, 4, 18))
    for corner in range(4):  # of a window; in a vector and behind it
        x[corner, 2 + corner // 2, corner % 2, (corner, 17)] = np.nan
    spoilt = np.isnan(x)
    ones = np.ones_like(x, dtype)

    @jax.jit
    def run(x, residual, *others):
        y, pull = jax.vjp(lambda *arrays: finish(*arrays, None, True), x, *others)
        added, added_pull = jax.vjp(lambda *arrays: finish(*arrays, residual, True), jnp.zeros_like(x), *others)
        pooled, pooled_pull = jax.vjp(lambda *arrays: finish_pool(*arrays, True), x, *others)
        return (y, *pull(ones)), (added, *added_pull(x)), (pooled, *pooled_pull(ones[:, ::2, ::2]))

    whole, added, pooled = jax.tree.map(np.isnan, run(x.astype(dtype), x.astype(dtype), *parameters(18)))
    np.testing.assert_array_equal(whole[0], spoilt)
    np.testing.assert_array_equal(added[0], spoilt)
    windows = spoilt.reshape(4, 2, 2, 2, 2, 18).any((2, 4))
    np.testing.assert_array_equal(pooled[0], windows)
    assert not pooled[1].any()  # no pixel of such a window takes the gradient
    for results in (whole, pooled):
        np.testing.assert_array_equal(results[3], spoilt.any((0, 1, 2)))  # through x, to the factor


def test_images_of_one_row_have_nothing_to_pool(form):
    y, pull = jax.vjp(lambda x: finish_pool(x, *parameters(8), True), random(2, 1, 4, 8))
    assert y.shape == (2, 0, 2, 8)
    np.testing.assert_array_equal(pull(y)[0], np.zeros((2, 1, 4, 8), np.float32))


@pytest.mark.parametrize("product", HESSIAN_PRODUCTS)
def test_hessian_vector_products(product):
    def loss(whole, pooled, arrays):
        x, *others = arrays
        return jnp.square(pooled(whole(x, *others, x, True), *others, True)).sum()

    arrays = (random(2, 3, 4, 6), *parameters(6))
    assert_close(product(partial(loss, finish, finish_pool), arrays), product(partial(loss, plain, plain_pool), arrays))


@pytest.mark.cpu
@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
def test_kernels_take_float32_and_bfloat16_with_parameters_of_float32():
    def uses_kernels(x, residual, *parameters):
        whole = jax.make_jaxpr(lambda *arrays: finish(*arrays, residual, True))(x, *parameters)
        pooled = jax.make_jaxpr(lambda *arrays: finish_pool(*arrays, True))(x, *parameters)
        return "ffi_call" in str(whole), "ffi_call" in str(pooled)

    x, others = jnp.ones((2, 4, 4, 8)), parameters(8)
    half = x.astype(jnp.bfloat16)
    assert uses_kernels(x, x, *others) == uses_kernels(half, half, *others) == (True, True)
    assert uses_kernels(half, x, *others) == (False, True)
    assert uses_kernels(half, half, *(array.astype(jnp.bfloat16) for array in others)) == (False, False)
    assert uses_kernels(x.astype(jnp.float16), None, *others) == (False, False)
