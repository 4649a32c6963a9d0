"""Layers against lax, numpy and plain autodiff: values, gradients, and under every transformation the loops use."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxunlearn.ops import winograd
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.normalization import EPS, batch_norm
from jaxunlearn.ops.pooling import max_pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("full_precision")]


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal to `tolerance` of the largest element, leaf by leaf."""
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * float(jnp.abs(other).max()) + 1e-30)


def forward_over_reverse(function, point):
    """The derivative of `function`'s gradient along ones."""
    return jax.jvp(jax.grad(function), (point,), (jax.tree.map(jnp.ones_like, point),))[1]


def reverse_over_reverse(function, point):
    """The same, as the gradient of the gradient's sum."""
    return jax.grad(lambda point: sum(x.sum() for x in jax.tree.leaves(jax.grad(function)(point))))(point)


def alone(over, function, point):
    return jax.jit(partial(over, function))(point)


def of_two_seeds(over, function, point):
    points = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), point)
    return jax.jit(jax.vmap(partial(over, function)))(points)


HESSIAN_PRODUCTS = [
    pytest.param(partial(how, over), id=f"{over.__name__}-{how.__name__}")
    for over in (forward_over_reverse, reverse_over_reverse)
    for how in (alone, of_two_seeds)
]


def lax_conv(x, kernel, stride, groups):
    pad = kernel.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=numbers, feature_group_count=groups
    )


# batch, height, width, channels, features, kernel, stride, groups
CONVOLUTIONS = [
    (4, 8, 8, 3, 16, 3, 1, 1),  # stem
    (4, 8, 8, 16, 16, 3, 1, 1),
    (4, 8, 8, 16, 32, 3, 2, 1),
    (3, 7, 5, 20, 24, 3, 2, 1),  # odd and oblong
    (3, 5, 7, 20, 24, 3, 1, 1),
    (3, 2, 2, 20, 24, 3, 1, 1),
    (3, 2, 2, 20, 24, 3, 2, 1),
    (3, 1, 1, 20, 24, 3, 1, 1),
    (1, 6, 6, 4, 20, 5, 1, 1),
    (3, 8, 8, 64, 80, 3, 1, 1),  # wide
    (3, 7, 10, 80, 64, 3, 1, 1),
    (3, 9, 9, 64, 64, 3, 1, 1),
    (3, 1, 2, 64, 64, 3, 1, 1),
    (3, 4, 4, 64, 64, 3, 2, 1),
    (3, 7, 5, 24, 40, 3, 2, 1),  # vectors of all widths
    (2, 5, 17, 56, 40, 3, 1, 1),
    (2, 3, 19, 16, 16, 3, 1, 1),
    (2, 7, 9, 24, 16, 3, 3, 1),
    (2, 7, 6, 16, 24, 5, 2, 1),
    (3, 7, 7, 20, 24, 1, 2, 1),
    (3, 7, 5, 24, 40, 1, 2, 1),
    (3, 6, 9, 40, 24, 1, 1, 1),
    (4, 6, 6, 20, 20, 3, 1, 20),  # depthwise
    (32, 6, 6, 20, 20, 3, 2, 20),
    (3, 7, 5, 20, 20, 3, 2, 20),
    (3, 2, 2, 20, 20, 3, 2, 20),
    (2, 7, 7, 6, 6, 5, 2, 6),
    (20, 7, 5, 72, 72, 3, 1, 72),
    (17, 5, 11, 80, 80, 3, 1, 80),
    (2, 4, 9, 80, 80, 3, 2, 80),
    (2, 4, 1, 80, 80, 3, 1, 80),
    (20, 7, 6, 72, 72, 3, 2, 72),
    (3, 2, 1, 65, 65, 5, 2, 65),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution_and_gradients_are_those_of_lax(shape):
    batch, height, width, channels, features, size, stride, groups = shape
    x, kernel = random(batch, height, width, channels), random(size, size, channels // groups, features, seed=1)
    g = random(batch, -(-height // stride), -(-width // stride), features, seed=2)

    def value_and_gradients(conv):
        def run(x, kernel, g):
            y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, stride, groups), x, kernel)
            return y, *pull(g)

        return jax.jit(run)(x, kernel, g)

    assert_close(value_and_gradients(conv2d), value_and_gradients(lax_conv))


@pytest.mark.parametrize("images", [1, 2, 3, 7, 100])
def test_minimal_filtering_is_the_same_in_chunks_of_any_size(images, monkeypatch):
    x, kernel = random(7, 6, 5, 64), random(3, 3, 64, 72, seed=1)
    tile_bytes = 16 * 72 * 4
    monkeypatch.setattr(winograd, "CHUNK_BYTES", images * 3 * 3 * tile_bytes)
    assert_close(jax.jit(winograd.forward)(x, kernel), lax_conv(x, kernel, 1, 1))


def small_network(conv, norm, pool):
    """Scalar function of images and weights through every layer that has rules of its own."""

    def network(x, weights):
        y = conv(x, weights["stem"], 1, 1)
        y, mean, var = norm(y, weights["scale"], weights["bias"], None, weights["bias"], True)
        z = conv(y, weights["depthwise"], 1, 20)
        z = conv(z, weights["pointwise"], 1, 1)
        z, _, _ = norm(z, weights["scale"], weights["bias"], y, weights["bias"], True)
        z = conv(pool(z), weights["strided"], 2, 1)
        z = conv(conv(z, weights["widening"], 1, 1), weights["wide"], 1, 1)
        return jnp.sin(z).sum() + jnp.sum(mean * var)

    return network


def plain_batch_norm(x, scale, bias, residual, near, relu):
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    y = (x - mean) / jnp.sqrt(var + EPS) * scale + bias
    y = y if residual is None else y + residual
    return jax.nn.relu(y) if relu else y, mean, var


def plain_max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


ours = small_network(conv2d, batch_norm, max_pool)
plain = small_network(lax_conv, plain_batch_norm, plain_max_pool)


def images_and_weights(*seeds: int):
    x = random(*seeds, 4, 8, 8, 3)
    weights = {
        "stem": random(*seeds, 3, 3, 3, 20, seed=1) / 5,
        "scale": 1 + random(*seeds, 20, seed=2) / 4,
        "bias": random(*seeds, 20, seed=3),
        "depthwise": random(*seeds, 3, 3, 1, 20, seed=4) / 3,
        "pointwise": random(*seeds, 1, 1, 20, 20, seed=5) / 4,
        "strided": random(*seeds, 3, 3, 20, 24, seed=6) / 13,
        "widening": random(*seeds, 1, 1, 24, 64, seed=7) / 5,
        "wide": random(*seeds, 3, 3, 64, 64, seed=8) / 24,
    }
    return x, weights


step = jax.value_and_grad(ours, (0, 1))
jitted_step = jax.jit(step)


def pick(tree, axis, i):
    return tree if axis is None else jax.tree.map(lambda a: a[i], tree)


def test_network_of_all_layers_has_the_plain_gradients():
    assert_close(jitted_step(*images_and_weights()), jax.jit(jax.value_and_grad(plain, (0, 1)))(*images_and_weights()))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)], ids=["both", "weights only", "images only"])
def test_vmap_over_seeds_is_a_loop_over_seeds(axes):
    x, weights = images_and_weights(2)
    x, weights = (x if axes[0] == 0 else x[0]), (weights if axes[1] == 0 else pick(weights, 0, 0))
    each = [jitted_step(pick(x, axes[0], i), pick(weights, axes[1], i)) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert_close(jax.jit(jax.vmap(step, axes))(x, weights), stacked)


def test_gradient_of_vmap_is_vmap_of_gradient():
    x, weights = images_and_weights(2)
    outside = jax.jit(jax.grad(lambda w: jax.vmap(ours)(x, w).sum()))(weights)
    each = [jitted_step(x[i], pick(weights, 0, i))[1][1] for i in range(2)]
    assert_close(outside, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def test_same_in_scan_and_cond_and_under_nested_vmap():
    x, weights = images_and_weights()
    expected = jitted_step(x, weights)
    scanned = jax.jit(lambda x, w: lax.scan(lambda w, x: (w, step(x, w)), w, x[None])[1])(x, weights)
    assert_close(pick(scanned, 0, 0), expected)

    @jax.jit
    def branch(epoch, x, w):
        def taken(x, w):
            return lax.cond(epoch < 2, step, lambda x, w: (0.0, (x, w)), x, w)

        return jax.vmap(jax.vmap(taken))(*jax.tree.map(lambda a: a[None, None], (x, w)))

    assert_close(jax.tree.map(lambda a: a[0, 0], branch(0, x, weights)), expected)
    assert_close(jax.tree.map(lambda a: a[0, 0], branch(2, x, weights)[1]), (x, weights))


def test_seeds_in_shard_map_and_batch_in_global_view():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    x, weights = images_and_weights(2)
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("seed")
    each = [jitted_step(x[i], pick(weights, 0, i)) for i in range(2)]
    mapped = jax.shard_map(jax.jit(jax.vmap(step)), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    assert_close(jax.jit(mapped)(x, weights), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))

    # Here the axis called seed shards the batch: BatchNorm sees it whole all the same.
    halves = jax.device_put(x[0], NamedSharding(mesh, spec))
    replicated = jax.device_put(pick(weights, 0, 0), NamedSharding(mesh, PartitionSpec()))
    assert_close(jitted_step(halves, replicated), each[0], 1e-4)


def test_float64():
    with jax.enable_x64(True):
        x, weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), images_and_weights())
        assert_close(jitted_step(x, weights), jax.jit(jax.value_and_grad(plain, (0, 1)))(x, weights), 1e-12)


@pytest.mark.parametrize("product", HESSIAN_PRODUCTS)
def test_hessian_vector_products(product):
    x, weights = images_and_weights()
    assert_close(product(partial(ours, x), weights), product(partial(plain, x), weights), 1e-3)


def test_equal_maxima_give_the_gradient_to_the_first():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 7, 6, 5)).astype(np.float32))
    g = random(3, 3, 3, 5)
    y, pull = jax.vjp(max_pool, x)
    dx = np.zeros(x.shape, np.float32)
    for b, i, j, c in np.ndindex(g.shape):
        window = np.asarray(x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c])
        assert y[b, i, j, c] == window.max()
        row, column = np.unravel_index(window.argmax(), (2, 2))
        dx[b, 2 * i + row, 2 * j + column, c] = g[b, i, j, c]
    np.testing.assert_array_equal(pull(g)[0], dx)
