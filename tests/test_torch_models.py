"""Models that are used as PyTorch's modules are."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_torch_style import FORGET, PLAIN_PROTOCOL, RETAIN, make_model
from tiny import CLASSES, PROTOCOL, assert_close, assert_differ

from jaxunlearn import torch_style
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_a_model_in_train_mode_moves_its_statistics_in_the_order_of_the_calls():
    model, network = make_model(), make_network(PLAIN_PROTOCOL, CLASSES)
    stats, key = model.batch_stats, jax.random.key(0)
    for images in (RETAIN.images, FORGET.images, RETAIN.images):
        logits, stats = network.apply_train(model.params, stats, images, key)
        assert_close(model(images), logits, 0)
        assert_close(model.batch_stats, stats, 0)


def test_a_model_in_eval_mode_uses_its_statistics_and_keeps_them():
    model, network = make_model(), make_network(PLAIN_PROTOCOL, CLASSES)
    model(RETAIN.images)
    stats = model.batch_stats
    assert model.eval() is model
    assert_close(model(FORGET.images), network.apply_eval(model.params, stats, FORGET.images), 0)
    assert model.batch_stats is stats
    assert_differ(model.train()(FORGET.images), model.eval()(FORGET.images))
    assert model.train().training and not model.train(False).training


def test_dropout_is_new_with_every_call_and_for_every_copy():
    model = make_model(model=PROTOCOL.model)
    teacher = copy.deepcopy(model)
    outputs = [forward(RETAIN.images) for forward in (model, model, teacher)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert_differ(outputs[one], outputs[other])
    assert_close(model.eval()(RETAIN.images), model(RETAIN.images), 0)


def test_a_copy_stays_as_it_is_and_has_no_gradient():
    model = make_model()
    teacher = copy.deepcopy(model).eval()
    params, expected = model.params, teacher(RETAIN.images)
    model(RETAIN.images)
    model.params = jax.tree.map(lambda p: 2 * p, params)
    assert model.training and not teacher.training
    assert_close(teacher(RETAIN.images), expected, 0)

    def loss(params):
        model.params = params
        return copy.deepcopy(model)(RETAIN.images).sum()

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_a_reset_model_has_new_parameters_and_old_statistics():
    model = make_model()
    model(RETAIN.images)
    before, stats = model.params, model.batch_stats
    model.reset_parameters()
    once = model.params
    model.reset_parameters()
    for pair in ((before, once), (once, model.params)):
        assert_differ(*pair)
    assert model.batch_stats is stats
    model.reset_running_stats()
    assert_close(model.batch_stats, make_network(PLAIN_PROTOCOL, CLASSES).initialise(jax.random.key(0))[1], 0)


def test_images_in_pytorchs_layout_are_refused():
    with pytest.raises(UserError, match=r"images \[B, 32, 32, 3\], not \[9, 3, 32, 32\]: .*transpose"):
        make_model()(RETAIN.images.transpose(0, 3, 1, 2))


def test_batch_norm_alone_in_eval_mode_keeps_its_statistics_and_learns():
    model = make_model()
    stats, expected = model.batch_stats, model.eval()(RETAIN.images)
    assert model.train(batch_norm=False).training
    assert_close(model(RETAIN.images), expected, 1e-6)
    assert model.batch_stats is stats
    dropping = make_model(model=PROTOCOL.model).train(batch_norm=False)
    assert_differ(dropping(RETAIN.images), dropping(RETAIN.images))
    assert_differ(model.train()(RETAIN.images), expected)


def test_features_are_what_the_last_layer_is_given():
    model = make_model()
    twin = copy.deepcopy(model)
    for switched in (model.train, model.eval):
        switched()
        logits, features = model.with_features(RETAIN.images)
        head = {name: np.asarray(array) for name, array in model.named_parameters()}
        np.testing.assert_allclose(features @ head["linear.weight"] + head["linear.bias"], logits, atol=1e-5)
    twin(RETAIN.images)
    assert_close(model.batch_stats, twin.batch_stats, 1e-6)  # moved once


def test_gradients_reach_the_images():
    model = make_model().eval()
    gradient = jax.grad(lambda images: model(images)[:, 0].sum())(RETAIN.images)
    assert gradient.shape == RETAIN.images.shape and (gradient != 0).any()


NAMES = ["conv.weight", "bn.weight", "bn.bias", "linear.weight", "linear.bias"]


def test_arrays_are_read_and_replaced_by_name():
    model = make_model()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert list(model.state_dict()) == [*NAMES, "bn.running_mean", "bn.running_var"]
    assert_close(model.parameters(), [array for _, array in model.named_parameters()], 0)
    before = model.state_dict()
    model.load_state_dict({"bn.weight": 2 * before["bn.weight"], "bn.running_mean": np.ones(6)})
    assert_close(model.params["bn"]["scale"], 2 * before["bn.weight"], 0)
    assert_close(model.batch_stats["bn"]["mean"], np.ones(6, np.float32), 0)
    model.load_state_dict(before)
    assert_close(model.state_dict(), before, 0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"linaer.weight": 1.0}, "the model has no 'linaer.weight': did you mean 'linear.weight'"),
        ({"linear.bias": np.zeros(4)}, r"'linear.bias' is \[3\] in the model, not \[4\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, message):
    with pytest.raises(UserError, match=message):
        make_model().load_state_dict(state)


def test_what_a_model_would_lose_cannot_be_set():
    with pytest.raises(AttributeError, match="no attribute 'linear'"):
        make_model().linear = jnp.zeros(3)


CONSTRUCTORS = {
    "resnet20": "resnet20-cifar10-class0",
    "vgg16_bn": "vgg16bn-cifar100-class0",
    "mobilenet_v2": "mobilenetv2-fmnist-class0",
}
ENDS = {
    "resnet20": ("conv1.weight", "linear.bias"),
    "vgg16_bn": ("features.0.weight", "classifier.3.bias"),
    "mobilenet_v2": ("features.0.0.weight", "classifier.1.bias"),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_the_network_of_its_benchmark(name):
    network = make_network(get_benchmark(CONSTRUCTORS[name]), CLASSES)
    made = getattr(torch_style, name)(num_classes=CLASSES, seed=1)
    params, batch_stats = jax.jit(network.initialise)(jax.random.key(1))
    assert_close((made.params, made.batch_stats), (params, batch_stats), 0)
    assert made.training
    arrays = made.state_dict()
    assert arrays.keys() == to_state_dict({"params": params, "batch_stats": batch_stats}).keys()
    names = [name for name, _ in made.named_parameters()]
    assert (names[0], names[-1]) == ENDS[name] and len(names) == len(jax.tree.leaves(params))
    made.load_state_dict(arrays)
    assert_close((made.params, made.batch_stats), (params, batch_stats), 0)
    functions = made.network.apply_eval, jax.jit(network.apply_eval)
    mine, theirs = (function.lower(params, batch_stats, RETAIN.images).as_text() for function in functions)
    assert mine == theirs


def test_a_constructors_model_computes_what_the_network_does_also_from_a_file(tmp_path):
    network = make_network(get_benchmark("resnet20-cifar10-class0"), 10)
    made = torch_style.resnet20(seed=1)
    variables = {"params": made.params, "batch_stats": made.batch_stats}
    np.savez(tmp_path / "weights.npz", **to_state_dict(variables))
    model = torch_style.resnet20(weights=tmp_path / "weights.npz")
    logits, stats = jax.jit(network.apply_train)(*variables.values(), RETAIN.images, jax.random.key(0))
    assert_close(model(RETAIN.images), logits, 1e-5)
    assert_close(model.batch_stats, stats, 1e-5)
    expected = jax.jit(network.apply_eval)(made.params, stats, FORGET.images)
    assert_close(model.eval()(FORGET.images), expected, 1e-5)
    with pytest.raises(UserError, match="do not fit the model"):
        torch_style.resnet20(weights=tmp_path / "weights.npz", num_classes=7)
