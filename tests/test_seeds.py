"""Several seeds in the forms of GPU and TPU: what is compiled there, and, computed on the CPU, what comes out."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from tiny import PROTOCOL, assert_close, mesh_of, pretraining_of, run_epochs, seed_of

from jaxunlearn.benchmarks import BENCHMARKS, get_benchmark
from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.models.network import make_network
from jaxunlearn.ops import blocks, convolution
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.randomness import abstract_key

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    """What is traced takes the forms of a GPU. The CPU computes those too."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(jax, "default_backend", lambda: "gpu")
        yield


def convolutions(jaxpr, of_images):
    """Every convolution in it, and which of its outputs depend on the images; `of_images`: which inputs do.

    Returns ([(a convolution's parameters, whether its kernel depends on the images)], [bool]).
    """
    depends, found = dict(zip(jaxpr.invars, of_images, strict=True)), []

    def of(variables):
        return [not isinstance(v, Literal) and depends.get(v, False) for v in variables]

    for equation in jaxpr.eqns:
        inputs = of(equation.invars)
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name == "conv_general_dilated":
            found.append((equation.params, inputs[1]))
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                is_call = (len(inner.invars), len(inner.outvars)) == (len(inputs), len(outputs))
                within, results = convolutions(inner, inputs if is_call else [any(inputs)] * len(inner.invars))
                found, outputs = found + within, results if is_call else outputs
        depends |= zip(equation.outvars, outputs, strict=True)
    return found, of(jaxpr.outvars)


def of_training(name, seeds):
    """`convolutions` of the gradient of a pretraining step of several seeds."""
    network = make_network(get_benchmark(name), 10)

    def gradient(params, batch_stats, key, images, labels):
        def loss(params):
            return cross_entropy(network.apply_train(params, batch_stats, images, key)[0], labels)

        return jax.grad(loss)(params)

    key = abstract_key()
    images, labels = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    arguments = (*jax.eval_shape(network.initialise, key), key, images, labels)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), arguments)
    of_images = [leaf is arguments[3] for leaf in jax.tree.leaves(arguments)]
    found, outputs = convolutions(jax.make_jaxpr(jax.vmap(gradient))(*arguments).jaxpr, of_images)
    assert any(outputs)
    return found


def grouped_by_images(found):
    return [params for params, of_images in found if of_images and params["feature_group_count"] > 1]


def left_to_vmap(monkeypatch):
    monkeypatch.setattr(convolution, "seedwise", lambda function, *arrays, together: function(*arrays))


@pytest.mark.parametrize("name", {protocol.model: name for name, protocol in BENCHMARKS.items()}.values())
def test_no_kernel_gradient_is_a_forward_convolution_with_images_as_its_kernel(name, monkeypatch):
    found = of_training(name, 4)
    assert any(of_images for _, of_images in found)
    assert not grouped_by_images(found)
    left_to_vmap(monkeypatch)
    assert grouped_by_images(of_training(name, 4))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# height and width, channels, features, kernel, stride, groups; in how many groups 2, 3, 5 and 8 seeds are:
# of images, of the kernel's gradient
EACH, ONE = (2, 3, 5, 8), (1, 1, 1, 1)
LAYERS = {
    "stem": ((6, 3, 16, 3, 1, 1), ONE, ONE),
    "16": ((6, 16, 16, 3, 1, 1), EACH, (1, 1, 1, 2)),
    "16 to 32": ((6, 16, 32, 3, 2, 1), EACH, (1, 1, 1, 2)),
    "32": ((5, 32, 32, 3, 1, 1), EACH, (1, 1, 1, 4)),
    "64": ((4, 64, 64, 3, 1, 1), EACH, EACH),
    "64 to 128": ((4, 64, 128, 3, 2, 1), EACH, EACH),
    "1x1": ((4, 24, 40, 1, 1, 1), EACH, (1, 1, 1, 2)),
    "1x1 stride 2": ((5, 16, 32, 1, 2, 1), EACH, (1, 1, 1, 2)),
    "depthwise": ((5, 24, 24, 3, 1, 24), (48, 72, 120, 192), (48, 72, 120, 192)),
    "depthwise stride 2": ((6, 24, 24, 3, 2, 24), (48, 72, 120, 192), (48, 72, 120, 192)),
}


def layer_of(shape, seeds):
    """(x, kernel, g) of some seeds, and the value and both gradients of one."""
    pixels, channels, features, size, stride, groups = shape
    out = -(-pixels // stride)
    arrays = (
        random(seeds, 3, pixels, pixels, channels),
        random(seeds, size, size, channels // groups, features, seed=1),
        random(seeds, 3, out, out, features, seed=2),
    )

    def value_and_gradients(x, kernel, g):
        y, pull = jax.vjp(lambda x, kernel: conv2d(x, kernel, stride, groups), x, kernel)
        return y, *pull(g)

    return arrays, value_and_gradients


def seeds_of(tree, count):
    """The first `count` seeds."""
    return jax.tree.map(lambda a: a[:count], tree)


def groups_of(program, arrays):
    """Those of each convolution, in their order."""
    found, _ = convolutions(jax.make_jaxpr(program)(*arrays).jaxpr, [True] * 3)
    return [max(params["feature_group_count"], params["batch_group_count"]) for params, _ in found]


@pytest.mark.parametrize(("shape", "of_images", "of_kernel"), LAYERS.values(), ids=LAYERS)
def test_seeds_of_a_layer_are_each_seed_alone(shape, of_images, of_kernel):
    arrays, run = layer_of(shape, 8)
    alone = jax.jit(lambda *arrays: jax.lax.map(lambda one: run(*one), arrays))(*arrays)
    for seeds, images, kernel in zip(EACH, of_images, of_kernel, strict=True):
        some = seeds_of(arrays, seeds)
        assert groups_of(jax.vmap(run), some) == [images, images, kernel]
        assert_close(jax.jit(jax.vmap(run))(*some), seeds_of(alone, seeds), 1e-5)
    assert groups_of(jax.vmap(run), seeds_of(arrays, 1)) == [shape[-1]] * 3


@pytest.mark.parametrize("widths", [(8, 8), (64, 16), (128, 128)])
def test_the_widths_of_groups_are_said_in_one_place(widths, monkeypatch):
    arrays, run = layer_of(LAYERS["16"][0], 8)
    alone = jax.jit(jax.vmap(run))(*arrays)
    monkeypatch.setitem(blocks.WIDTHS, 4, widths)
    images, kernel = (min(8, 128 // width) for width in widths)
    assert groups_of(jax.vmap(run), arrays) == [images, images, kernel]
    assert_close(jax.jit(jax.vmap(run))(*arrays), alone, 1e-5)


@pytest.mark.parametrize("shared", [0, 1], ids=["images", "kernel"])
@pytest.mark.parametrize("name", ["16", "1x1", "depthwise"])
def test_seeds_may_share_what_they_compute_with(name, shared):
    (*arrays, g), run = layer_of(LAYERS[name][0], 2)
    arrays[shared] = arrays[shared][0]
    axes = [0 if i != shared else None for i in range(2)]
    together = jax.jit(jax.vmap(run, (*axes, 0)))(*arrays, g)
    each = [run(*(a if axis is None else a[i] for a, axis in zip(arrays, axes, strict=True)), g[i]) for i in range(2)]
    assert_close(together, jax.tree.map(lambda *a: jnp.stack(a), *each), 1e-5)


@pytest.mark.parametrize("width", [16, 64])
def test_a_seed_that_diverges_is_seen_and_does_not_touch_its_group(width, monkeypatch):
    monkeypatch.setitem(blocks.WIDTHS, 4, (width, 64))
    arrays, run = layer_of(LAYERS["16"][0], 3)
    program = jax.jit(jax.vmap(run))
    expected = program(*arrays)
    for place, value in itertools.product(range(3), (np.nan, np.inf)):
        broken = list(arrays)
        broken[place] = arrays[place].at[1, 0, 0, 0, 0].set(value)
        results = program(*broken)
        for seed in (0, 2):
            assert_close([a[seed] for a in results], [a[seed] for a in expected], 0)
        y, _, dkernel = (np.isfinite(a[1]).all() for a in results)
        assert not (y and dkernel)


def trained(seeds, mesh):
    """The state and the metrics of some seeds after a step in float64: sums over many images, which the CPU takes one
    by one where a GPU takes a tree of them, would differ in float32."""
    with jax.enable_x64(True), jax.set_mesh(mesh):
        run, keys = pretraining_of.__wrapped__(dataclasses.replace(PROTOCOL, precision="fp64"), seeds, mesh)
        return run_epochs(run, run.start(keys), keys, 1)


@pytest.fixture(scope="module")
def third_alone(tiny_models, as_on_a_gpu):
    return trained((3,), mesh_of())


@pytest.mark.parametrize("split", [(1, 1), (1, 2), (2, 2)])
def test_a_training_step_of_seeds_is_each_seed_alone(split, third_alone):
    assert_close(seed_of(trained((1, 2, 3, 4), mesh_of(*split)), 2), third_alone, 1e-9)
