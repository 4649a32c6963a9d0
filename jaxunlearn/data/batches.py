"""Batches made on the device: images stay there as uint8; order, crop, flip and normalisation happen inside jit.

Every function is for one seed and has no state: randomness comes in as a key.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol

IMAGE_SIZE = 32  # pixels a side, for every model


class Images(NamedTuple):
    """Images on the device, before augmentation and normalisation."""

    images: jax.Array  # u8[N, 32, 32, 1 or 3]
    labels: jax.Array  # i32[N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a training step and an unlearning rule see. It unpacks as a pair: `images, labels = batch`."""

    images: jax.Array  # f32[B, 32, 32, 3], normalised
    labels: jax.Array  # i32[B]
    indices: jax.Array  # i32[B], the place of each image among the training images

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.images, self.labels))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: Any) -> Any:
        return (self.images, self.labels)[place]


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


def augment(images: jax.Array, indices: jax.Array, key: jax.Array, protocol: Protocol) -> jax.Array:
    """Random crop of the padded image, then a horizontal flip with probability one half.

    u8[N, H, W, C], of which those at `indices`, i32[B], are taken, to u8[B, H, W, C]. One gather for everything: no
    padded image is written, and on an accelerator it is one kernel.
    """
    height, width, pad = *images.shape[1:3], protocol.crop_pixels
    # One draw for everything: each takes a quarter of a second to compile. The remainder's bias is below 1e-7.
    bits = jax.random.bits(key, (len(indices), 3), jnp.uint32)
    offsets = (bits[:, :2] % (2 * pad + 1)).astype(jnp.int32) - pad
    columns = jnp.arange(width)
    if protocol.flip:
        columns = jnp.where((bits[:, 2:] & 1).astype(bool), columns[::-1], columns)
    rows, columns = offsets[:, :1] + jnp.arange(height), offsets[:, 1:] + columns
    inside = _inside(rows, height)[:, :, None, None] & _inside(columns, width)[:, None, :, None]
    rows, columns = (_reflected(*of) for of in ((rows, height), (columns, width)))
    pixels = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels if protocol.crop_padding == "reflect" else jnp.where(inside, pixels, 0)


def _inside(places: jax.Array, size: int) -> jax.Array:
    return (places >= 0) & (places < size)


def _reflected(places: jax.Array, size: int) -> jax.Array:
    """Places beyond an edge as far inside it."""
    return size - 1 - jnp.abs(size - 1 - jnp.abs(places))


def clean_batch(data: Images, indices: jax.Array, protocol: Protocol) -> Batch:
    """The images at `indices`, i32[B], normalised."""
    return Batch(normalise(data.images[indices], protocol), data.labels[indices], indices)


def augmented_batch(data: Images, indices: jax.Array, key: jax.Array, protocol: Protocol) -> Batch:
    """The images at `indices`, i32[B], cropped, flipped and normalised."""
    return Batch(normalise(augment(data.images, indices, key, protocol), protocol), data.labels[indices], indices)
