"""Convolutions that read a normalised image and leave the moments of their result, against plain JAX."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import HESSIAN_PRODUCTS, assert_close, lax_conv, random

from jaxunlearn.models.layers import BatchNorm, Conv
from jaxunlearn.ops import native
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.fused import Convolved, Normalised, convolve, written

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.usefixtures("full_precision"),
    pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler"),
]

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

# batch, height, width, channels, features, kernel, stride, groups
SHAPES = [
    (4, 8, 8, 3, 16, 3, 1, 1),  # stem
    (4, 8, 8, 16, 16, 3, 1, 1),
    (3, 7, 5, 16, 32, 3, 2, 1),  # odd and oblong
    (2, 5, 17, 56, 40, 3, 1, 1),  # vectors of all widths
    (2, 7, 9, 24, 16, 3, 3, 1),
    (3, 1, 1, 24, 24, 3, 1, 1),
    (2, 7, 6, 16, 24, 5, 2, 1),
    (3, 7, 10, 80, 64, 3, 1, 1),
    (3, 1, 2, 64, 64, 3, 1, 1),
    (3, 7, 5, 24, 40, 1, 2, 1),  # pointwise
    (3, 6, 9, 40, 16, 1, 1, 1),
    (4, 6, 6, 20, 20, 3, 1, 20),  # depthwise
    (2, 7, 7, 6, 6, 5, 2, 6),
    (3, 7, 6, 80, 80, 3, 2, 80),
    (2, 4, 1, 80, 80, 3, 1, 80),
]


def arguments(batch, height, width, channels, features, size, stride, groups):
    """x, mean, factor, bias, kernel; and cotangents of y, its mean and its variance."""
    pixels = batch, -(-height // stride), -(-width // stride)
    x, kernel = random(batch, height, width, channels), random(size, size, channels // groups, features, seed=1)
    parameters = [random(channels, seed=seed) / 4 + offset for seed, offset in ((2, 0), (3, 1), (4, 0))]
    moments = [np.prod(pixels) * random(features, seed=seed) for seed in (6, 7)]
    cotangents = random(*pixels, features, seed=5), *moments
    return (x, *parameters, kernel / np.sqrt(size * size * channels / groups)), cotangents


def plain(x, mean, factor, bias, kernel, *, stride, groups, reading):
    z = (x - mean) * factor + bias if reading else x
    y = lax_conv(jnp.where(z > 0, z, 0) if reading == "relu" else z, kernel, stride, groups)
    return y, y.mean((0, 1, 2)), y.var((0, 1, 2))


def fused(x, mean, factor, bias, kernel, *, stride, groups, reading):
    image = Normalised(x, mean, factor, bias, reading == "relu") if reading else x
    return tuple(convolve(image, kernel, stride, groups))


def values_and_gradients(function, primals, cotangents, **of):
    values, pull = jax.vjp(lambda *primals: function(*primals, **of), *primals)
    return values, pull(cotangents)


# One shape of each kernel is read in every way.
CASES = [(shape, None if shape[3] == 3 else "relu") for shape in SHAPES] + [
    (SHAPES[i], how) for i in (1, 2, 9, 12) for how in (None, "affine")
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("shape", "reading"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_layers_apart(shape, reading):
    of = {"stride": shape[-2], "groups": shape[-1], "reading": reading}
    expected = jax.jit(lambda *a: values_and_gradients(plain, *a, **of))(*arguments(*shape))
    assert_close(jax.jit(lambda *a: values_and_gradients(fused, *a, **of))(*arguments(*shape)), expected)


HALF_CASES = [(shape, "relu") for shape in SHAPES[1:]] + [
    (shape, how)
    for shape in (
        (43, 4, 4, 48, 72, 3, 1, 1),  # blocks of several images, of which the last is not full
        (131, 2, 2, 40, 24, 3, 2, 1),
        (70, 7, 5, 8, 8, 3, 2, 1),
        (200, 4, 4, 8, 8, 1, 1, 1),
        (16, 16, 16, 16, 16, 3, 1, 1),
        (9, 12, 12, 32, 24, 1, 1, 1),
        (2, 9, 4, 16, 8, 7, 1, 1),
    )
    for how in (None, "relu")
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("shape", "reading"), HALF_CASES, ids=str)
def test_bfloat16_images_are_rounded_float32(shape, reading):
    """To the rounding of what is stored: inputs, the image read, the result; sums and parameters stay float32."""
    (x, *parameters), cotangents = arguments(*shape)
    x, cotangents = x.astype(jnp.bfloat16), (cotangents[0].astype(jnp.bfloat16), *cotangents[1:])
    of = {"stride": shape[-2], "groups": shape[-1], "reading": reading}
    values, gradients = values_and_gradients(fused, (x, *parameters), cotangents, **of)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), ((x, *parameters), cotangents))
    assert values[0].dtype == gradients[0].dtype == jnp.bfloat16 and gradients[4].dtype == jnp.float32
    ours = jax.tree.map(lambda a: a.astype(jnp.float32), (values, gradients))
    # An element of a product of n terms is off by sqrt(n) roundings of one, of 2^-9 each, and is sqrt(n) of one.
    assert_close(ours, values_and_gradients(plain, *wide, **of), 4 * 2.0**-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1, 1e2, 1e4])
def test_the_variance_of_a_constant_is_no_less_than_zero(dtype, magnitude):
    """Below it by more than BatchNorm's epsilon it would make NaN. Of rounding alone: some 2^-24 of the square."""
    x = jnp.broadcast_to(magnitude * (1 + 0.07 * jnp.arange(16)), (16, 16, 16, 16)).astype(dtype)
    y, _, var = convolve(x, random(1, 1, 16, 16), 1, 1)
    assert (var >= 0).all() and (var <= 2.0**-18 * float(jnp.square(y.astype(jnp.float32)).max())).all()


@pytest.mark.skipif("amx_bf16" not in CPU or "-march" in os.environ.get("CXX", ""), reason="needs tiles (AMX)")
def test_the_processors_tiles_are_used():
    program = jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, 1, 1))
    assert "tiles_forward_bf16" in str(program(jnp.ones((1, 4, 4, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16))))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 3, 8, 16), 2), ((1, 1, 8, 16), 2), ((3, 3, 1, 32), 16), ((2, 2, 1, 16), 16), ((2, 2, 16, 16), 1)],
)
def test_kernels_of_several_groups_or_even_size_are_left_to_xla(shape, groups):
    x, kernel = random(2, 5, 4, 16), random(*shape, seed=1)
    assert convolve(x, kernel, 1, groups) is None

    def gradients(conv):
        return jax.jit(jax.grad(lambda *a: jnp.sin(conv(*a, 2, groups)).sum(), (0, 1)))(x, kernel)

    assert_close(gradients(conv2d), gradients(lax_conv))


@pytest.mark.parametrize("product", HESSIAN_PRODUCTS)
def test_hessian_vector_products(product):
    (x, *parameters, kernel), _ = arguments(2, 4, 4, 16, 16, 3, 1, 1)

    def loss(function, kernel):
        parts = function(x, *parameters, kernel, stride=1, groups=1, reading="affine")
        return sum(jnp.sin(part).sum() for part in parts)

    assert_close(product(partial(loss, fused), kernel), product(partial(loss, plain), kernel), 1e-4)


@pytest.mark.parametrize("features", [16, 12])  # by a kernel, by XLA
def test_each_layer_computes_in_its_own_dtype(features):
    variables = {
        "params": {"kernel": jnp.ones((3, 3, 16, features)), "scale": jnp.ones(features), "bias": jnp.ones(features)},
        "batch_stats": {"mean": jnp.zeros(features), "var": jnp.ones(features)},
    }
    image = Normalised(jnp.ones((2, 3, 3, 16), jnp.bfloat16), jnp.zeros(16), jnp.ones(16), jnp.ones(16), relu=True)
    for conv, norm in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        y = Conv(features, dtype=conv).apply(variables, image, moments=True)
        assert (y.y if isinstance(y, Convolved) else y).dtype == conv
        z = BatchNorm(norm).apply(variables, y, False, write=False)
        assert written(z).dtype == norm


def test_padding_is_none_of_the_normalised_image():
    x, kernel = jnp.zeros((1, 3, 3, 16)), jnp.ones((3, 3, 16, 16))
    image = Normalised(x, jnp.zeros(16), jnp.ones(16), jnp.ones(16), relu=True)  # ones all over
    y = convolve(image, kernel, 1, 1).y[0, :, :, 0] / 16
    np.testing.assert_array_equal(y, [[4, 6, 4], [6, 9, 6], [4, 6, 4]])


def test_the_variance_does_not_cancel():
    x = 1000 + random(8, 8, 8, 16)
    _, mean, var = convolve(x, jnp.eye(16)[None, None], 1, 1)
    flat = np.asarray(x, np.float64).reshape(-1, 16)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, flat.var(0), rtol=1e-4)


def test_nan_stays_nan_in_the_result_and_in_the_gradients():
    (x, *parameters, kernel), cotangents = arguments(2, 8, 8, 16, 16, 3, 1, 1)
    bad = x.at[1, 4, 4, 3].set(jnp.nan)
    of = {"stride": 1, "groups": 1, "reading": "relu"}
    (y, mean, _), (*_, gkernel) = values_and_gradients(fused, (bad, *parameters, kernel), cotangents, **of)
    assert jnp.isnan(y[1, 3:6, 3:6]).all() and jnp.isfinite(y[0]).all() and jnp.isnan(mean).all()
    assert jnp.isnan(gkernel).all()


def test_seeds_vmapped_are_seeds_alone():
    of = {"stride": 1, "groups": 1, "reading": "relu"}
    primals, cotangents = arguments(4, 6, 6, 16, 24, 3, 1, 1)
    two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (primals, cotangents))
    together = jax.jit(jax.vmap(lambda *a: values_and_gradients(fused, *a, **of)))(*two)
    alone = jax.jit(lambda *a: values_and_gradients(fused, *a, **of))
    for seed in range(2):
        mine, own = (jax.tree.map(lambda leaf, seed=seed: leaf[seed], tree) for tree in (together, two))
        jax.tree.map(np.testing.assert_array_equal, mine, alone(*own))


def test_what_is_read_is_what_is_written_out():
    (x, *parameters, _), _ = arguments(2, 4, 4, 16, 16, 3, 1, 1)
    image = Normalised(x, *parameters, relu=True)
    y = convolve(image, jnp.eye(16)[None, None], 1, 1).y
    np.testing.assert_allclose(y, written(image), rtol=1e-6, atol=1e-7)


def test_a_normalised_image_passes_through_jit_and_checkpoint():
    (x, *parameters, _), _ = arguments(2, 4, 4, 16, 16, 3, 1, 1)
    image = Normalised(x, *parameters, relu=True)
    again = jax.jit(jax.checkpoint(lambda image: image))(image)
    np.testing.assert_array_equal(written(again), written(image))
    np.testing.assert_array_equal(jax.jit(written)(image), written(image))
