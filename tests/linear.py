"""A network that numpy follows: images centred by BatchNorm without a scale, then one linear layer; and its batches.

Losses are written in numpy as functions of a `Model`; their gradients are differences of them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import PROTOCOL, make_batch

from jaxunlearn.models.network import Forward, Network
from jaxunlearn.training.unlearning import make_context

CLASSES, WIDTH = 3, 4


def _forward(params, batch_stats, images, key, train, batch_norm):
    images = images.reshape(len(images), -1)
    mean, moves = images.mean(0), train and batch_norm
    features = images - (mean if moves else batch_stats["bn"]["mean"])
    stats = {"bn": {"mean": 0.5 * batch_stats["bn"]["mean"] + 0.5 * mean}} if moves else batch_stats
    return Forward(features @ params["head"]["kernel"] + params["head"]["bias"], features, stats)


def _apply_train(params, batch_stats, images, key):
    logits, _, stats = _forward(params, batch_stats, images, key, True, True)
    return logits, stats


def _initialise(key):
    kernel = jax.random.normal(key, (WIDTH, CLASSES))
    return {"head": {"kernel": kernel, "bias": 0.1 * kernel[0]}}, {"bn": {"mean": 0.2 * kernel[:, 0]}}


NETWORK = Network(
    initialise=_initialise,
    apply_train=_apply_train,
    apply_eval=lambda params, stats, images: _forward(params, stats, images, None, False, True).logits,
    forward=_forward,
    layers=lambda: ("bn", "head"),
)


def linear_context(steps_per_epoch=2, optimizer=None):
    """What a rule is told of the network. Plain gradient descent of rate 1, so that a step shows the gradient."""
    context = make_context(NETWORK, PROTOCOL, CLASSES, steps_per_epoch)
    return context._replace(optimizer=optimizer or optax.sgd(1.0))


def linear_batch(count, seed, labels=None):
    batch = make_batch(count, seed, labels)
    return dataclasses.replace(batch, images=jnp.asarray(np.asarray(batch.images[:, :2, :1, :2], float)))


def linear_model(seed):
    """(params, batch_stats) in float64, where that is enabled."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, float)), _initialise(jax.random.key(seed)))


class Model(NamedTuple):
    """The network in numpy, in train mode."""

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, batch):
        images = np.asarray(batch.images).reshape(len(batch.images), -1)
        return (images - images.mean(0)) @ self.kernel + self.bias

    def in_eval_mode(self, batch, mean):
        images = np.asarray(batch.images).reshape(len(batch.images), -1)
        return (images - np.asarray(mean)) @ self.kernel + self.bias


def moved(stats, *batches):
    """BatchNorm's running mean after train-mode forwards of these batches."""
    mean = np.asarray(stats["bn"]["mean"])
    for batch in batches:
        mean = 0.5 * mean + 0.5 * np.asarray(batch.images).reshape(len(batch.images), -1).mean(0)
    return mean


def in_numpy(params):
    return Model(*(np.asarray(params["head"][name], float) for name in ("kernel", "bias")))


def gradient(loss, model, width=1e-6):
    """The gradient of loss(model), a Model too, by central differences: good to about 1e-9."""

    def along(field, index):
        ends = []
        for sign in (1, -1):
            array = getattr(model, field).copy()
            array[index] += sign * width
            ends.append(loss(model._replace(**{field: array})))
        return (ends[0] - ends[1]) / (2 * width)

    return Model(
        *(
            np.array([along(field, index) for index in np.ndindex(value.shape)]).reshape(value.shape)
            for field, value in model._asdict().items()
        )
    )


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(logits)), np.asarray(labels)].mean()


def vector(gradients):
    """A Model's arrays as one vector."""
    return np.concatenate([array.ravel() for array in gradients])


def assert_same(actual, expected):
    """Two Models, to what the differences are good for."""
    for have, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-8)


def take_step(stepped, params, state, retain, forget, **changes):
    """(what a jitted step took from the parameters, a Model; its state; its metrics). `changes`: of the state before.

    With the context's plain descent, what it took is the gradient.
    """
    after, state, metrics = stepped(params, state._replace(**changes), retain, forget)
    old, new = in_numpy(params), in_numpy(after)
    return Model(old.kernel - new.kernel, old.bias - new.bias), state, metrics
