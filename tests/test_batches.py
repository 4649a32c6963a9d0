import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import PROTOCOL, make_images

from jaxunlearn.data.batches import Images, augment, augmented_batch, clean_batch, epoch_order, normalise, resize

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]  # for its quick compilation
augment = jax.jit(augment, static_argnums=3)
augmented_batch = jax.jit(augmented_batch, static_argnums=3)


def protocol_with(**changes):
    return dataclasses.replace(PROTOCOL, **changes)


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows_to_the_bit(size, channels):
    rng = np.random.default_rng(size)
    extremes = rng.choice(np.array([0, 255], np.uint8), (20, size, size, channels))
    images = np.concatenate([rng.integers(0, 256, (20, size, size, channels), np.uint8), extremes])
    expected = [
        np.asarray(Image.fromarray(i.squeeze()).resize((32, 32), Image.Resampling.BILINEAR)).reshape(32, 32, channels)
        for i in images
    ]
    np.testing.assert_array_equal(jax.jit(resize)(images), expected)


def test_resize_leaves_the_right_size_alone():
    images = make_images(2).images
    np.testing.assert_array_equal(resize(images), images)


def shifts(image, pad, mode):
    """{bytes of each crop of the padded image, flipped or not: (row, column, flipped)}"""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode)
    side = image.shape[0]
    crops = {(y, x): padded[y : y + side, x : x + side] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}
    return {c[:, :: -1 if f else 1].tobytes(): (y, x, f) for (y, x), c in crops.items() for f in (False, True)}


@pytest.mark.parametrize(("padding", "mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("flip", [True, False])
def test_augment_draws_every_shift_and_flip_and_nothing_else(padding, mode, flip):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    protocol = protocol_with(crop_pixels=2, crop_padding=padding, flip=flip)
    outputs = np.asarray(augment(jnp.asarray(image)[None], jnp.zeros(1200, jnp.int32), jax.random.key(0), protocol))
    allowed = {k: v for k, v in shifts(image, 2, mode).items() if flip or not v[2]}
    drawn = [allowed[output.tobytes()] for output in outputs]  # KeyError: an output that is no shifted version
    counts = np.unique([y * 10 + x * 2 + f for y, x, f in drawn], return_counts=True)[1]
    assert len(counts) == len(allowed) == (50 if flip else 25)
    mean = 1200 / len(allowed)
    assert ((counts - mean) ** 2 / mean).sum() < 2 * len(allowed)  # chi-squared: about len(allowed) where uniform


def test_augment_without_crop_and_flip_is_the_identity():
    images = jnp.asarray(make_images(5).images)
    protocol = protocol_with(crop_pixels=0, flip=False)
    np.testing.assert_array_equal(augment(images, jnp.arange(5), jax.random.key(0), protocol), images)


def test_augment_differs_by_key_only():
    images, protocol = jnp.asarray(make_images(8).images), protocol_with(crop_pixels=4)
    first, again, other = (np.asarray(augment(images, jnp.arange(8), jax.random.key(k), protocol)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_padding_is_black_before_normalisation():
    white = Images(jnp.full((50, 32, 32, 3), 255, jnp.uint8), jnp.zeros(50, jnp.int32))
    batch = augmented_batch(white, jnp.arange(50), jax.random.key(0), PROTOCOL)
    for channel, (mean, std) in enumerate(zip(PROTOCOL.mean, PROTOCOL.std, strict=True)):
        values = np.unique(batch.images[..., channel])
        np.testing.assert_allclose(values, [(0 - mean) / std, (1 - mean) / std], rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_repeats_grey_and_scales_each_channel(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, channels), np.uint8)
    three = np.repeat(pixels, 3 // channels, -1).astype(np.float64)
    result = normalise(jnp.asarray(pixels), PROTOCOL)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (three / 255 - PROTOCOL.mean) / PROTOCOL.std, rtol=1e-5, atol=1e-6)


def test_batches_hold_the_chosen_images_and_their_labels():
    data, chosen = Images(*map(jnp.asarray, make_images(9))), jnp.array([7, 0, 5])
    plain = protocol_with(crop_pixels=0, flip=False)
    for batch in (clean_batch(data, chosen, PROTOCOL), augmented_batch(data, chosen, jax.random.key(0), plain)):
        np.testing.assert_allclose(batch.images, normalise(data.images[chosen], PROTOCOL), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.labels, data.labels[chosen])
        np.testing.assert_array_equal(batch.indices, chosen)
    assert (augmented_batch(data, chosen, jax.random.key(0), PROTOCOL).images != batch.images).any()


def test_a_batch_is_a_pair_to_who_unpacks_it_and_a_tree_of_three_to_jax():
    data, chosen = Images(*map(jnp.asarray, make_images(9))), jnp.array([7, 0, 5])
    batch = clean_batch(data, chosen, PROTOCOL)
    images, labels = batch
    assert images is batch.images is batch[0] and labels is batch.labels is batch[-1]
    first = jax.tree.map(lambda x: x[:1], batch)
    assert [part.shape for part in jax.tree.leaves(first)] == [(1, 32, 32, 3), (1,), (1,)]
    assert first.indices == 7


def test_epoch_order_is_a_new_permutation_for_every_pass_and_key():
    indices = jnp.arange(100, 140) * 3
    first, again, other = (np.asarray(epoch_order(jax.random.key(k), indices, passes=3)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    orders = [indices, *first, *other]
    assert len({np.asarray(order).tobytes() for order in orders}) == 7
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), indices)
