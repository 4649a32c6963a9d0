"""PyTorch state_dict <-> variables: common names, folded biases, what does not fit, the same logits as PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_dicts import random_state, shapes

from jaxunlearn.errors import UserError
from jaxunlearn.models import build
from jaxunlearn.models.torch_weights import from_state_dict, load_weights, to_state_dict


def refused(state, variables):
    with pytest.raises(UserError) as caught:
        from_state_dict(state, variables)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["resnet20", "vgg16bn", "mobilenetv2"])
def test_round_trip(name):
    variables = shapes(name)
    state = random_state(variables)
    back = to_state_dict(from_state_dict(state, variables))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


def test_names_and_layouts_are_pytorch_ones():
    state = random_state(shapes("mobilenetv2"))
    assert state["features.1.conv.0.0.weight"].shape == (32, 1, 3, 3)  # depthwise
    assert state["features.2.conv.0.0.weight"].shape == (96, 16, 1, 1)
    assert state["classifier.1.weight"].shape == (10, 1280)
    loaded = from_state_dict(state, shapes("mobilenetv2"))
    kernel = loaded["params"]["features.2.conv.0.0"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 0, 3, 7], state["features.2.conv.0.0.weight"][7, 3, 0, 0])
    np.testing.assert_array_equal(loaded["params"]["features.2.conv.0.1"]["scale"], state["features.2.conv.0.1.weight"])
    stats = loaded["batch_stats"]["features.2.conv.0.1"]
    np.testing.assert_array_equal(stats["mean"], state["features.2.conv.0.1.running_mean"])
    np.testing.assert_array_equal(stats["var"], state["features.2.conv.0.1.running_var"])


def test_values_take_the_dtypes_of_the_model():
    variables = shapes()
    state = random_state(variables)
    halved = {key: value.astype(np.float16) if key.endswith("weight") else value for key, value in state.items()}
    loaded = from_state_dict(halved, variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(loaded["params"]["linear"]["kernel"], halved["linear.weight"].T.astype(np.float32))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("shortcut", [".shortcut.", ".downsample."])
@pytest.mark.parametrize("head", ["linear.", "fc.", "classifier.", "head.0."])
def test_names_in_common_use(prefix, shortcut, head):
    variables = shapes()
    state = random_state(variables)
    other = {prefix + key.replace(".shortcut.", shortcut).replace("linear.", head): state[key] for key in state}
    other[f"{prefix}bn1.num_batches_tracked"] = np.int64(7)
    same = jax.tree.map(np.array_equal, from_state_dict(other, variables), from_state_dict(state, variables))
    assert jax.tree.all(same)


def test_a_bias_of_one_linear_layer_keeps_its_place():
    state = random_state(shapes())
    other = {key.replace("linear.", "classifier."): value for key, value in state.items()}
    other["classifier.bias"] = other["classifier.bias"][:9]
    assert "classifier.bias (9,) instead of (10,)" in refused(other, shapes())


def test_the_other_shortcut_is_named_with_its_flag():
    a, b = shapes(resnet_shortcut="A"), shapes()
    assert "--resnet-shortcut A" in refused(random_state(a), b)
    assert "--resnet-shortcut B" in refused(random_state(b), a)
    renamed = {key.replace(".shortcut.", ".downsample."): value for key, value in random_state(b).items()}
    assert "--resnet-shortcut B" in refused(renamed, a)
    assert "--resnet-shortcut" not in refused(random_state(shapes("vgg16bn")), b)  # another model altogether


def test_another_classifier_is_refused_by_its_widths():
    vgg = shapes("vgg16bn", 100)
    state = random_state(vgg)
    for number, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):  # torchvision's
        state[f"classifier.{number}.weight"] = np.broadcast_to(np.float32(0), shape)
        state[f"classifier.{number}.bias"] = np.broadcast_to(np.float32(0), shape[:1])
    message = refused(state, vgg)
    assert "25088-4096-4096-1000" in message and "512-512-100" in message
    assert "64-100" in refused(random_state(shapes(classes=100)), shapes())
    headless = {key: value for key, value in random_state(shapes()).items() if "linear" not in key}
    assert "classifier is missing" in refused(headless, shapes())


def test_misfits_are_listed_in_one_line(tmp_path):
    variables = shapes()
    state = random_state(variables)
    del state["conv1.weight"]
    state["fc2.weight"] = np.zeros(3, np.float32)
    state["module.bias"] = np.zeros(3, np.float32)  # not all keys have this prefix
    state["linear.weight"] = np.zeros((100, 64), np.float32)
    state["layer1.0.conv1.bias"] = np.zeros(7, np.float32)  # folds into nothing: its BatchNorm has 16 channels
    message = refused(state, variables)
    for part in ("missing conv1.weight", "fc2.weight", "module.bias", "layer1.0.conv1.bias"):
        assert part in message
    assert "linear.weight (100, 64) instead of (10, 64)" in message
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(UserError, match=r"weights\.npz: .*missing conv1\.weight"):
        load_weights(tmp_path / "weights.npz", variables)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bn1.weight", np.array(["a"] * 16), "real numbers: bn1.weight"),
        ("bn1.weight", np.zeros(16, np.complex64), "real numbers: bn1.weight"),
        ("bn1.weight", np.full(16, np.nan, np.float32), "finite: bn1.weight"),
        ("layer1.0.bn1.running_var", np.full(16, -np.inf, np.float32), "finite: layer1.0.bn1.running_var"),
        ("bn1.weight", np.full(16, 1e300), "finite: bn1.weight"),  # not in float32
        ("conv1.bias", np.full(16, np.nan, np.float32), "finite: bn1.running_mean"),
        ("layer1.0.bn1.running_var", np.full(16, -1e-9), "variance cannot be negative: layer1.0.bn1.running_var"),
        ("fc.weight", np.zeros((10, 64), np.float32), "twice: linear.weight and fc.weight"),
    ],
)
def test_values_that_are_no_weights_are_named(key, value, said):
    assert said in refused({**random_state(shapes()), key: value}, shapes())


def reference(model, images):
    """Moves a PyTorch model from its initial state: BatchNorm statistics of `images`, scales and biases at random."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.2, generator=generator)
                module.momentum = 1.0
        model.train()(images)
    return model.eval()


def numpy_state(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def inputs(count=4):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).normal(size=(count, 32, 32, 3)).astype(np.float32)
    return images, torch.tensor(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet20", {}),
        ("resnet20", {"resnet_shortcut": "A"}),
        ("vgg16bn", {}),
        ("mobilenetv2", {}),
        ("mobilenetv2", {"mobilenet_stride": 2}),
    ],
)
def test_logits_are_those_of_pytorch(name, options):
    torch = pytest.importorskip("torch")
    from jaxunlearn.torch_reference import models

    torch.manual_seed(0)
    cases = {
        "resnet20": lambda: models.ResNet20(10, *options.values()),
        "vgg16bn": lambda: models.VGG16BN(10),
        "mobilenetv2": lambda: models.MobileNetV2(10, *options.values()),
    }
    images, tensors = inputs()
    model = cases[name]()
    models.initialise(model)
    reference(model, tensors)
    with torch.no_grad():
        expected = model(tensors).numpy()
    variables = from_state_dict(numpy_state(model), shapes(name, **options))
    ours = jax.jit(lambda images: build(name, 10, **options).apply(variables, images, train=False))(images)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_biases_before_batch_norm_are_folded_in_both_modes():
    torch = pytest.importorskip("torch")
    from jaxunlearn.torch_reference import models

    torch.manual_seed(0)
    model = models.ResNet20(10)

    def biased(conv):
        layer = torch.nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        torch.nn.init.normal_(layer.bias)
        return layer

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Conv2d):
                setattr(module, name, biased(child))
    images, tensors = inputs()
    reference(model, tensors)
    state = numpy_state(model)
    assert sum(key.endswith("conv1.bias") for key in state) == 10 and "layer2.0.shortcut.0.bias" in state

    with torch.no_grad():
        expected = model(tensors[:2]).numpy()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.1
        model.train()(tensors)
    variables = from_state_dict(state, shapes())

    @jax.jit
    def ours(images):
        apply = build("resnet20", 10).apply
        _, updates = apply(variables, images, train=True, mutable=["batch_stats"])
        return apply(variables, images[:2], train=False), updates["batch_stats"]

    logits, updates = ours(images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    moved = from_state_dict(numpy_state(model), shapes())["batch_stats"]
    for key, want in to_state_dict({"batch_stats": moved}).items():
        got = to_state_dict({"batch_stats": updates})[key]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=key)


def test_biases_are_folded_under_torchvisions_numbering():
    vgg = shapes("vgg16bn")
    state = random_state(vgg)
    loaded = from_state_dict(state | {"features.40.bias": np.full(512, 3, np.float32)}, vgg)
    mean = state["features.41.running_mean"] - 3
    np.testing.assert_allclose(loaded["batch_stats"]["features.41"]["mean"], mean, rtol=1e-6)
