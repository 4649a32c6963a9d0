"""Batches made on the device: images stay there as uint8; order, crop, flip and normalisation happen inside jit.

Every function is for one seed and has no state: randomness comes in as a key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol

IMAGE_SIZE = 32  # pixels a side, for every model


class Images(NamedTuple):
    """Images on the device, before augmentation and normalisation."""

    images: jax.Array  # u8[N, 32, 32, 1 or 3]
    labels: jax.Array  # i32[N]


class Batch(NamedTuple):
    """What a training step and an unlearning rule see."""

    images: jax.Array  # f32[B, 32, 32, 3], normalised
    labels: jax.Array  # i32[B]


def resize(images: jax.Array, size: int = IMAGE_SIZE) -> jax.Array:
    """Bilinear enlargement of u8[N, H, W, C] to u8[N, size, size, C], to the bit what Pillow computes.

    Pillow (and so torchvision on its images) works in fixed point with 22 fractional bits and rounds to uint8 after
    each of its two passes, rows first. Half-pixel centres; weights at the border are renormalised.
    """

    def enlarge(pixels: jax.Array, axis: int) -> jax.Array:
        source = pixels.shape[axis]
        centres = (np.arange(size) + 0.5) * source / size - 0.5
        weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(source)))
        fixed = np.rint(weights / weights.sum(1, keepdims=True) * 2**22).astype(np.int32)
        total = jnp.tensordot(pixels.astype(jnp.int32), jnp.asarray(fixed), axes=((axis,), (1,)))
        return jnp.moveaxis((total + 2**21) >> 22, -1, axis).clip(0, 255).astype(jnp.uint8)

    if images.shape[1:3] == (size, size):
        return images
    return enlarge(enlarge(images, 2), 1)


def epoch_order(key: jax.Array, indices: jax.Array, passes: int = 1) -> jax.Array:
    """A fresh random order of `indices`, i32[N], for each of `passes` passes: i32[passes, N]."""
    return jax.vmap(lambda k: jax.random.permutation(k, indices))(jax.random.split(key, passes))


def normalise(images: jax.Array, protocol: Protocol) -> jax.Array:
    """u8[B, H, W, 1 or 3] to f32[B, H, W, 3]; a single channel is repeated."""
    mean, std = (np.asarray(values, np.float32) for values in (protocol.mean, protocol.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(images: jax.Array, key: jax.Array, protocol: Protocol) -> jax.Array:
    """Random crop of the padded image, then a horizontal flip with probability one half: u8[B, H, W, C] to the same."""
    count, height, width, channels = images.shape
    pad = protocol.crop_pixels
    # One draw for everything: each takes a quarter of a second to compile. The remainder's bias is below 1e-7.
    bits = jax.random.bits(key, (count, 3), jnp.uint32)
    if pad:
        mode = "constant" if protocol.crop_padding == "zero" else "reflect"
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode)
        offsets = (bits[:, :2] % (2 * pad + 1)).astype(jnp.int32)

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (*offset, jnp.zeros_like(offset[0])), (height, width, channels))

        images = jax.vmap(crop)(padded, offsets)
    if protocol.flip:
        flipped = (bits[:, 2] & 1).astype(bool)
        images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    return images


def clean_batch(data: Images, indices: jax.Array, protocol: Protocol) -> Batch:
    """The images at `indices`, i32[B], normalised."""
    return Batch(normalise(data.images[indices], protocol), data.labels[indices])


def augmented_batch(data: Images, indices: jax.Array, key: jax.Array, protocol: Protocol) -> Batch:
    """The images at `indices`, i32[B], cropped, flipped and normalised."""
    return Batch(normalise(augment(data.images[indices], key, protocol), protocol), data.labels[indices])
