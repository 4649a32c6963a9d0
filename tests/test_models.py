"""The benchmark's models: sizes, names, initialisation, what train mode changes, and real trained weights."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.benchmarks import Protocol, get_benchmark
from jaxunlearn.data.batches import normalise, resize
from jaxunlearn.data.datasets import find
from jaxunlearn.errors import UserError
from jaxunlearn.models import MODELS, build
from jaxunlearn.models.initialisation import initial_variables
from jaxunlearn.models.layers import Conv, Linear
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import load_weights

pytestmark = pytest.mark.slow

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "classes", "options", "parameters"),
    [
        ("resnet20", 10, {}, 272_474),
        ("resnet20", 10, {"resnet_shortcut": "A"}, 269_722),
        ("vgg16bn", 100, {}, 15_032_868),
        ("mobilenetv2", 10, {}, 2_236_682),
        ("mobilenetv2", 10, {"mobilenet_stride": 2}, 2_236_682),
    ],
)
def test_parameter_counts_of_the_protocol(name, classes, options, parameters):
    variables = shapes(build(name, classes, **options))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize("name", ["resnet20", "vgg16bn", "mobilenetv2"])
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
    model = build(name, 7, dtype=jnp.bfloat16)
    variables = shapes(model)

    def apply(variables, images, key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    logits, updates = jax.eval_shape(apply, variables, IMAGES, jax.random.key(0))
    assert logits.shape == (2, 7)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updates, logits))} == {jnp.dtype(jnp.float32)}
    jaxpr = str(jax.make_jaxpr(apply)(variables, IMAGES, jax.random.key(0)))
    assert "bf16[2,32,32" in jaxpr


def test_mobilenet_strides():
    def largest_stage(stride):
        model = build("mobilenetv2", 10, mobilenet_stride=stride)
        text = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(shapes(model), IMAGES))
        return "f32[2,32,32,144]" in text, "f32[2,4,4,1280]" in text, "f32[2,2,2,1280]" in text

    assert largest_stage(1) == (True, True, False)
    assert largest_stage(2) == (False, False, True)


def some_variables(model):
    """Variables that keep signals at order one, quicker to make than an initialisation."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key == "kernel":
            return rng.normal(size=shape.shape).astype(np.float32) * np.sqrt(2 / np.prod(shape.shape[:-1]))
        return np.full(shape.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(model))


@pytest.mark.parametrize(
    ("layer", "channels", "variance"),
    [
        (Conv(32), 3, 2 / (9 * 32)),  # fan_out, not fan_in
        (Conv(320, groups=320), 320, 2 / (9 * 320)),  # depthwise: groups ignored
        (Conv(64, kernel_size=1), 32, 2 / 64),
        (Linear(10), 640, 2 / 640),  # fan_in
    ],
)
def test_initialisation_is_kaiming_with_pytorch_fans(layer, channels, variance):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 4, channels)))
    params = initial_variables(shapes, jax.random.key(0))["params"]
    kernel = np.asarray(params["kernel"])
    np.testing.assert_allclose(kernel.var(), variance, rtol=5 * np.sqrt(2 / kernel.size))  # five standard errors
    np.testing.assert_allclose(kernel.mean() / kernel.std(), 0, atol=5 / np.sqrt(kernel.size))
    assert not np.any(params.get("bias", 0))


def test_initial_kernels_are_independent_and_the_rest_is_constant():
    variables = initial_variables(shapes(build("resnet20", 10)), jax.random.key(0))
    params = variables["params"]
    first, second = (np.asarray(params[f"layer1.{block}.conv1"]["kernel"]).ravel() for block in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(first.size)
    assert all((norm["scale"] == 1).all() and (norm["bias"] == 0).all() for norm in params.values() if "scale" in norm)
    assert all((norm["var"] == 1).all() and (norm["mean"] == 0).all() for norm in variables["batch_stats"].values())


@pytest.mark.usefixtures("quick_compilation")
def test_train_mode_uses_the_batch_and_dropout_eval_mode_neither():
    model = build("vgg16bn", 4)
    variables = some_variables(model)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @jax.jit
    def train(key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    (first, updates), (second, again) = train(jax.random.key(2)), train(jax.random.key(3))
    assert not jnp.allclose(first, second)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updates, again))
    evaluate = jax.jit(lambda images: model.apply(variables, images, train=False))
    np.testing.assert_allclose(evaluate(images)[:2], evaluate(images[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
def test_mobilenet_has_dropout_where_it_is_asked_for():
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    for rate in (0.0, 0.5):
        network = make_network(replace(get_benchmark("mobilenetv2-fmnist-class0"), mobilenet_dropout=rate), 10)
        variables, apply = network.initialise(jax.random.key(0)), jax.jit(network.apply_train)
        first, second = (apply(*variables, images, jax.random.key(k))[0] for k in (2, 3))
        assert bool((first == second).all()) == (rate == 0.0)


@pytest.mark.usefixtures("quick_compilation")
def test_shortcut_a_halves_the_image_and_pads_the_channels_on_both_sides():
    model = build("resnet20", 10, resnet_shortcut="A")
    variables = some_variables(model)
    # With the convolutions of all blocks silent only the shortcuts act.
    params = {
        name: jax.tree.map(jnp.zeros_like, leaf) if name.startswith("layer") else leaf
        for name, leaf in variables["params"].items()
    }
    params["linear"] = {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    headless = build("resnet20", 64, resnet_shortcut="A")
    pooled = jax.jit(lambda images: headless.apply({**variables, "params": params}, images, train=False))(images)
    kernel = jnp.asarray(params["conv1"]["kernel"])
    stem = jax.lax.conv(images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")
    expected = jax.nn.relu(stem / np.sqrt(1 + 1e-5))[:, :, ::4, ::4].mean((2, 3))
    np.testing.assert_allclose(pooled[:, 24:40], expected, rtol=1e-4, atol=1e-5)
    assert not pooled[:, :24].any() and not pooled[:, 40:].any()


def test_unknown_choices_are_one_line():
    for bad in (lambda: build("resnet21", 10), lambda: build("resnet20", 10, resnet_shortcut="C")):
        with pytest.raises(UserError) as caught:
            bad()
        assert "\n" not in str(caught.value)
    assert set(MODELS) >= {"resnet20", "vgg16bn", "mobilenetv2"}


def real(name: str, pattern: str, classes: int, protocol: Protocol):
    """The real test set, and the variables of real weights; skips without them."""
    data, weights = os.environ.get("JAXUNLEARN_DATA"), os.environ.get("JAXUNLEARN_WEIGHTS")
    dataset = find(protocol.dataset, None, Path("absent")) if data else None
    if dataset is None:
        pytest.skip(f"needs the real {protocol.dataset} in $JAXUNLEARN_DATA")
    files = sorted(Path(weights).glob(pattern)) if weights else []
    if not files:
        pytest.skip(f"needs the real $JAXUNLEARN_WEIGHTS/{pattern}")
    return dataset.test, load_weights(files[0], shapes(build(name, classes)))


# The counts that PyTorch gets of the same files and pixels. (Of MobileNetV2 it gets 8,577 where FashionMNIST is
# enlarged by `interpolate` and rounded, which differs from Pillow's fixed point in single pixels.)
@pytest.mark.parametrize(
    ("bench", "classes", "pattern", "retain", "forget"),
    [
        ("resnet20-cifar10-class0", 10, "resnet20_*.npz", 8287, 926),
        ("vgg16bn-cifar100-class0", 100, "vgg16bn_*.npz", 6829, 81),
        ("mobilenetv2-fmnist-class0", 10, "mobilenetv2_*.npz", 8576, 911),
    ],
)
def test_real_weights_classify_as_in_pytorch(bench, classes, pattern, retain, forget):
    protocol = get_benchmark(bench)
    test, variables = real(protocol.model, pattern, classes, protocol)
    network = make_network(protocol, classes)

    @jax.jit
    def predict(pixels):
        images = normalise(resize(pixels), protocol)
        return network.apply_eval(variables["params"], variables["batch_stats"], images).argmax(-1)

    guesses = np.concatenate([predict(test.images[i : i + 500]) for i in range(0, len(test.labels), 500)])
    right = guesses == test.labels
    assert (right[test.labels != 0].sum(), right[test.labels == 0].sum()) == (retain, forget)
