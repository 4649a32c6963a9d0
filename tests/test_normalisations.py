"""Weights that were made for images of another mean and standard deviation are noticed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PROTOCOL, make_images

from jaxunlearn.evaluation.normalisations import CUSTOMARY, better_normalisation
from jaxunlearn.models.network import Network

MEAN, STD = CUSTOMARY["those of ImageNet"]
OWN = dataclasses.replace(PROTOCOL, mean=MEAN, std=STD)


def knows(images, mean, std):
    """A network that answers rightly where its images have this mean and deviation, else always class 0."""
    pixels = (images.images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    expected = float(pixels.std())

    def apply_eval(params, batch_stats, images):
        brightest = jnp.stack([images[..., c].mean((1, 2)) for c in range(3)], 1) * jnp.asarray(std) + jnp.asarray(mean)
        return jnp.where(abs(images.std() - expected) < 0.01, 1.0, 0.0) * brightest

    return Network(None, None, apply_eval, None, None)


def line(network, protocol, images):
    return better_normalisation(network, protocol, {"scale": jnp.ones(2)}, {"mean": jnp.ones(2)}, images)


def test_a_better_pair_is_named():
    images = make_images(120)
    said = line(knows(images, MEAN, STD), PROTOCOL, images)
    assert "33% of training images" in said and "100% with those of ImageNet" in said
    assert said.endswith("--set protocol.mean=0.485,0.456,0.406 --set protocol.std=0.229,0.224,0.225")


@pytest.mark.parametrize(("protocol", "pair"), [(OWN, (MEAN, STD)), (PROTOCOL, ((9.0,) * 3, (9.0,) * 3))])
def test_nothing_is_said_where_the_protocols_will_do_or_none_does(protocol, pair):
    images = make_images(120)
    assert line(knows(images, *pair), protocol, images) is None
