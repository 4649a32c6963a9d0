"""A model, a protocol and images so small that tests train them many times; and how tests compare what comes out."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Batch, Images
from jaxunlearn.devices.sharding import place_seeds, place_shared
from jaxunlearn.models.layers import BatchNorm, Conv, Linear, parameter_dtype
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import get_method
from jaxunlearn.training.loop import Timing
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.unlearning import Split, Unlearning

TINY, PLAIN = "tiny", "tiny-plain"  # with and without dropout: without, a forward in train mode needs no randomness
CLASSES = 3
COUNT = 57  # training images, 19 a class


class Tiny(nn.Module):
    num_classes: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x, train):
        x = Conv(6, stride=2, dtype=self.dtype, name="conv")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))
        x = x.astype(parameter_dtype(self.dtype)).mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Linear(self.num_classes, parameter_dtype(self.dtype), name="linear")(x)


# An epoch is one step, of pretraining (57 images) as of unlearning (38 and 19): one program to compile, and no size
# that divides by four devices. What needs more steps asks for smaller batches.
PROTOCOL = Protocol(
    model=TINY,
    dataset="digits",
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
    batch_size=COUNT,
    crop_pixels=2,
    pretrain_epochs=8,
    unlearn_epochs=4,
)

# What "the same" means: one step in fp32 to rounding, a short trajectory in float64; long fp32 runs are chaotic.
to_rounding = pytest.mark.parametrize(
    ("protocol", "epochs", "rtol"),
    [
        pytest.param(PROTOCOL, 1, 1e-5, id="fp32-one-step"),
        pytest.param(dataclasses.replace(PROTOCOL, precision="fp64"), 3, 1e-9, id="fp64-trajectory"),
    ],
)


def make_images(count: int = COUNT, seed: int = 0) -> Images:
    """Noise in which class c is brighter in channel c; the classes take turns."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % CLASSES
    pixels = rng.integers(0, 200, (count, 32, 32, 3)) + 55 * (labels[:, None] == np.arange(3))[:, None, None]
    return Images(pixels.astype(np.uint8), labels)


def make_batch(count: int, seed: int, labels=None) -> Batch:
    """Normalised images of any class, or of one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count) if labels is None else np.full(count, labels)
    images = rng.normal(size=(count, 32, 32, 3)) + (labels[:, None] == np.arange(3))[:, None, None]
    return Batch(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.arange(count))


def make_split(forget_class: int = 0) -> Split:
    labels = make_images().labels
    return Split(np.flatnonzero(labels != forget_class), np.flatnonzero(labels == forget_class))


def mesh_of(seed: int = 1, data: int = 1) -> jax.sharding.Mesh:
    """A mesh of any split; `make_mesh` offers some. Skips the test where there are not so many devices."""
    if seed * data > len(jax.devices()):
        pytest.skip(f"needs {seed * data} devices")
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((seed, data), ("seed", "data"), axis_types=types, devices=jax.devices()[: seed * data])


@functools.cache
def pretraining_of(protocol, seeds, mesh):
    """(pretraining, keys), made once for all tests: what it has compiled is for this number of seeds."""
    network = make_network(protocol, CLASSES)
    return Pretraining(network, protocol, make_images(), np.arange(COUNT), mesh, Timing()), seed_keys(seeds)


def make_unlearning(method, protocol, mesh, data=None, numbers=()):
    """The unlearning of a Method, which is checked against its contract."""
    data = place_shared(data or make_images(), mesh)
    network = make_network(protocol, CLASSES)
    unlearning = Unlearning(method, network, protocol, CLASSES, data, make_split(), mesh, Timing(), numbers)
    unlearning.check()
    return unlearning


@functools.cache
def unlearning_of(name, protocol, seeds, mesh):
    """(unlearning by a method of the package, keys), made once for all tests."""
    return make_unlearning(get_method(name), protocol, mesh), seed_keys(seeds)


@functools.cache
def host_models(protocol, seed):
    initialise = make_network(protocol, CLASSES).initialise
    params, batch_stats = jax.device_get(jax.jit(initialise)(seed_keys([seed])[0]))
    return params, jax.tree.map(lambda x: (0.7 * x + 0.2).astype(x.dtype), batch_stats)


def make_models(protocol, seeds, mesh):
    """Untrained models, BatchNorm statistics moved from their initial values: (params, batch_stats), seeds in front."""
    models = [host_models(protocol, seed) for seed in seeds]
    return place_seeds(jax.tree.map(lambda *x: np.stack(x), *models), mesh)


def run_epochs(run, state, keys, epochs, first=0):
    """Epochs `first` to `epochs` of a Pretraining or an Unlearning, on the host: (state, {metric: [seeds, steps]})."""
    metrics = []
    for epoch in range(first, epochs):
        state, values = run.epoch(state, keys, epoch)
        metrics.append(values)
    return jax.device_get(state), {name: np.concatenate([m[name] for m in metrics], 1) for name in metrics[0]}


@functools.cache
def pretrain(protocol, seeds, epochs, mesh):
    with jax.enable_x64(protocol.precision == "fp64"), jax.set_mesh(mesh):
        run, keys = pretraining_of(protocol, seeds, mesh)
        return run_epochs(run, run.start(keys), keys, epochs)


@functools.cache
def unlearn(name, protocol, seeds, epochs, mesh):
    with jax.enable_x64(protocol.precision == "fp64"), jax.set_mesh(mesh):
        run, keys = unlearning_of(name, protocol, seeds, mesh)
        return run_epochs(run, run.start(*make_models(protocol, seeds, mesh), keys), keys, epochs)


def seed_of(tree, index):
    """One seed's part of a tree, the seed axis kept."""
    return jax.tree.map(lambda x: x[index : index + 1], tree)


def assert_close(actual, expected, rtol):
    """Equal trees, every array within `rtol` of its largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), have in zip(expected_leaves, jax.tree.leaves(actual), strict=True):
        want, have = np.asarray(want), np.asarray(have)
        assert (have.shape, have.dtype) == (want.shape, want.dtype), jax.tree_util.keystr(path)
        error, scale = np.abs(have.astype(float) - want).max(), np.abs(want.astype(float)).max()
        assert error <= rtol * scale, f"{jax.tree_util.keystr(path)}: off by {error} of {scale}"


def assert_differ(first, second):
    """Some array of the two trees differs."""
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )


@contextlib.contextmanager
def counted_reads():
    """Counts what waits for the device: {"device_get": calls, "other": reads of an array by any other way}.

    JAX's transfer guard does not see reads where the device is the CPU, so this looks at the calls themselves.
    """
    counts, inside = {"device_get": 0, "other": 0}, []

    def counted(function, kind):
        def call(*args, **kwargs):
            counts[kind] += not inside
            inside.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    array = type(jnp.zeros(()))

    def counted_for_arrays(function):
        read = counted(function, "other")
        return lambda value, *args, **kwargs: (read if isinstance(value, array) else function)(value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, jax.transfer_guard("disallow"):
        patch.setattr(jax, "device_get", counted(jax.device_get, "device_get"))
        for name in ("asarray", "array"):  # they read an array's memory without a call
            patch.setattr(np, name, counted_for_arrays(getattr(np, name)))
        for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
            patch.setattr(array, name, counted(getattr(array, name), "other"))
        yield counts
