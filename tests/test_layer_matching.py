"""Layers under other names: matched one to one by role, shape and order, or refused."""

import re

import jax
import numpy as np
import pytest
from state_dicts import random_state, renamed, resnet_layers, shapes

from jaxunlearn.errors import UserError
from jaxunlearn.models.torch_weights import from_state_dict, load_weights
from jaxunlearn.models.weight_files import write_safetensors

MATCHED = "matched by order and shape"


def underscored(layer):
    return re.sub(r"(conv|bn|layer)(\d)", r"\1_\2", layer).replace("layer", "stage")


def wrapped(layer):
    """A module of convolution and BatchNorm for each pair."""
    return (
        re.sub(r"(conv|bn)(\d)$", r"unit\2.\1", layer)
        .replace("shortcut.0", "skip.conv")
        .replace("shortcut.1", "skip.bn")
    )


def sequential(layer):
    inside = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
    if layer in ("conv1", "bn1"):
        return f"stem.{inside[layer]}"
    return re.sub(r"layer(\d)\.(\d)\.(\w+\d)$", lambda m: f"conv{m[1]}_x.{m[2]}.residual.{inside[m[3]]}", layer)


def flat(layer):
    """All blocks in one list, which counts them through."""
    if layer in ("conv1", "bn1"):
        return layer[:-1] + "0"
    return re.sub(r"layer(\d)\.(\d)", lambda m: f"convs.{3 * int(m[1]) - 3 + int(m[2])}", layer)


def lettered(layer):
    """With the size of the first kernel in its name, which counts nothing."""
    layer = re.sub(r"\.(conv|bn)(\d)", lambda m: f".{m[1]}_{'xab'[int(m[2])]}", layer).replace("layer", "stage_")
    return {"conv1": "conv_1_3x3", "bn1": "bn_1", "linear": "classifier"}.get(layer, layer)


STYLES = {
    "letters": lettered,
    "underscores": underscored,
    "a stem without numbers": lambda layer: layer.removesuffix("1") if layer in ("conv1", "bn1") else layer,
    "blocks": lambda layer: re.sub(r"(layer\d)\.", r"\1.blocks.", layer),
    "units": wrapped,
    "sequential": sequential,
    "flat": flat,
}


def refused(state, variables, **options):
    with pytest.raises(UserError) as caught:
        from_state_dict(state, variables, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def same(found, expected):
    return jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_other_names_are_read_by_order(style, shortcut):
    variables = shapes(resnet_shortcut=shortcut)
    state = random_state(variables)
    other = renamed(state, {layer: STYLES[style](layer) for layer in resnet_layers(shortcut=shortcut)})
    with pytest.warns(UserWarning, match=MATCHED):
        assert same(from_state_dict(other, variables), from_state_dict(state, variables))


def test_a_shortcut_may_stand_before_its_block_and_batchnorms_behind_all_its_convolutions():
    variables, state = shapes(), random_state(shapes())
    place = {"shortcut.0": 0, "conv1": 2, "conv2": 3, "bn1": 4, "bn2": 5, "shortcut.1": 6}
    blocks = {}
    for layer in resnet_layers():
        blocks.setdefault(layer.rpartition(".shortcut")[0] or layer.rpartition(".")[0] or layer, []).append(layer)
    order = [
        layer
        for block, layers in blocks.items()
        for layer in sorted(layers, key=lambda layer: place.get(layer.removeprefix(block + "."), 0))
    ]
    assert order.index("layer2.0.shortcut.0") < order.index("layer2.0.conv2") < order.index("layer2.0.shortcut.1")
    other = renamed(state, {layer: underscored(layer) for layer in order})
    with pytest.warns(UserWarning, match=MATCHED):
        assert same(from_state_dict(other, variables), from_state_dict(state, variables))


def test_biases_of_convolutions_go_into_the_batchnorm_also_under_other_names():
    variables, state = shapes(), random_state(shapes())
    state |= {f"{layer}.bias": np.float32([3] * 16) for layer in ("conv1", "layer1.2.conv2")}
    other = renamed(state, {layer: flat(layer) for layer in resnet_layers()})
    assert "convs.2.conv2.bias" in other
    with pytest.warns(UserWarning, match=MATCHED):
        found = from_state_dict(other, variables)
    np.testing.assert_allclose(found["batch_stats"]["layer1.2.bn2"]["mean"], state["layer1.2.bn2.running_mean"] - 3)


def test_other_models_are_read_too():
    variables, state = shapes("vgg16bn", 100), random_state(shapes("vgg16bn", 100))
    layers = sorted(
        {key.rpartition(".")[0] for key in state}, key=lambda name: (name[0] == "c", int(name.split(".")[1]))
    )
    other = renamed(state, {layer: layer.replace("features", "body").replace("classifier", "head") for layer in layers})
    with pytest.warns(UserWarning, match=MATCHED):
        assert same(from_state_dict(other, variables), from_state_dict(state, variables))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("layer1.0.conv1", "layer1.0.conv2", "stage_1.0.conv_2 stands before stage_1.0.conv_1"),
        ("layer1.1.bn2", "layer3.2.bn1", "stage_3.2.bn_1 stands before stage_3.0.bn_1"),  # of another width
        ("layer2.1.bn1", "layer2.1.bn2", "stage_2.1.bn_2 stands before stage_2.1.bn_1"),
        ("layer3.1.conv1", "layer3.2.conv1", "stage_3.2.conv_1 stands before stage_3.1.conv_2"),
        ("conv1", "layer1.0.conv1", "beside"),
        ("layer1.0.conv1", "layer2.1.conv1", "order"),
    ],
)
def test_a_file_whose_layers_are_permuted_is_refused(first, second, said):
    swap = {first: second, second: first}
    order = [swap.get(layer, layer) for layer in resnet_layers()]
    state = renamed(random_state(shapes()), {layer: underscored(layer) for layer in order})
    assert said in refused(state, shapes())


def test_a_network_that_normalises_before_its_convolutions_is_refused():
    # Without parameters in its shortcuts it has the same shapes in the same order.
    inner = [layer for layer in resnet_layers(shortcut="A") if "." in layer]
    swapped = [layer.replace("bn", "x").replace("conv", "bn").replace("x", "conv") for layer in inner]
    own = dict(zip(["conv1", "bn1", *inner, "linear"], ["conv1", *swapped, "bn", "linear"], strict=True))
    state = renamed(random_state(shapes(resnet_shortcut="A")), own)
    assert [*state][:2] == ["conv1.weight", "layer1.0.bn1.weight"]
    assert "layer1.0.bn1 does not stand beside a convolution before it, such as conv1" in refused(
        state, shapes(resnet_shortcut="A")
    )


def test_a_format_without_order_cannot_be_matched(tmp_path):
    state = renamed(random_state(shapes()), {layer: underscored(layer) for layer in resnet_layers()})
    write_safetensors(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError, match=r"\.safetensors keeps no order"):
        load_weights(tmp_path / "w.safetensors", shapes())
    np.savez(tmp_path / "w.npz", **state)
    with pytest.warns(UserWarning, match=MATCHED):
        load_weights(tmp_path / "w.npz", shapes())


def test_what_fits_nowhere_is_paired_with_what_is_nearest():
    state = renamed(random_state(shapes()), {layer: underscored(layer) for layer in resnet_layers()})
    del state["stage_3.2.bn_2.bias"]
    message = refused(state, shapes())
    assert "missing bn1.bias (nearest: bn_1.bias (16,)), bn1.running_mean (nearest: bn_1.running_mean (16,))" in message


def test_another_classifier_is_named_by_its_widths_under_any_names():
    state = renamed(random_state(shapes(classes=100)), {layer: underscored(layer) for layer in resnet_layers()})
    assert "their classifier is 64-100, the model's is 64-10" in refused(state, shapes())


@pytest.mark.parametrize("style", [str, underscored])
def test_another_depth_is_named(style):
    source, state = random_state(shapes()), {}
    for layer in resnet_layers(5):
        like = re.sub(r"\.[34]\.", ".1.", layer)
        state |= {
            style(layer) + key.removeprefix(like): source[key] for key in source if key.rpartition(".")[0] == like
        }
    assert "they are those of ResNet-32, the model is ResNet-20" in refused(state, shapes())
