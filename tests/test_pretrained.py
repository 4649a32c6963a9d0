"""Weights that a run starts from: what the file says of the model and of its images."""

import numpy as np
import pytest
from state_dicts import random_state, shapes

from jaxunlearn import torch_style
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.devices.sharding import make_mesh
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import make_network
from jaxunlearn.runs.request import make_protocol
from jaxunlearn.training.pretrained import given

BENCH = "resnet20-cifar10-class0"


def file_of(tmp_path, shortcut, **beside):
    np.savez(tmp_path / f"{shortcut}.npz", **random_state(shapes(resnet_shortcut=shortcut)), **beside)
    return tmp_path / f"{shortcut}.npz"


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_shortcut_is_the_files_unless_the_user_says_which(tmp_path, shortcut):
    weights, other = file_of(tmp_path, shortcut), {"A": "B", "B": "A"}[shortcut]
    assert make_protocol(BENCH, {}, {}, weights).resnet_shortcut == shortcut
    assert make_protocol(BENCH, {"resnet_shortcut": other}, {}, weights).resnet_shortcut == other
    assert make_protocol(BENCH, {}, {"resnet_shortcut": other}, weights).resnet_shortcut == other
    assert make_protocol("vgg16bn-cifar100-class0", {}, {}, weights).resnet_shortcut == "B"  # of no meaning there


def test_a_file_that_cannot_be_read_is_named_before_anything_else(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"w\.pth: it is a web page"):
        make_protocol(BENCH, {}, {}, tmp_path / "w.pth")


def test_classes_take_the_shortcut_of_the_file_too(tmp_path):
    made = torch_style.resnet20(weights=file_of(tmp_path, "A"))
    assert not [layer for layer in made.params if "shortcut" in layer]
    assert [layer for layer in torch_style.resnet20(weights=file_of(tmp_path, "B")).params if "shortcut" in layer]


def test_another_mean_than_the_protocols_is_said(tmp_path):
    protocol, mesh = get_benchmark(BENCH), make_mesh(1, 1)
    network = make_network(protocol, 10)
    own = {"normalize.mean": np.float32(protocol.mean), "normalize.std": np.float32(protocol.std)}
    given(file_of(tmp_path, "B", **own), protocol, network, 1, mesh)
    own |= {"normalize.mean": np.full((1, 3, 1, 1), 0.5), "normalize.std": np.full(1, 0.25)}
    with pytest.warns(UserWarning, match=r"--set protocol\.mean=0\.5,0\.5,0\.5 --set protocol\.std=0\.25,0\.25,0\.25$"):
        given(file_of(tmp_path, "B", **own), protocol, network, 1, mesh)
    settings = {"mean": "0.5,0.5,0.5", "std": "0.25,0.25,0.25"}  # as the line says
    given(file_of(tmp_path, "B", **own), make_protocol(BENCH, {}, settings, None), network, 1, mesh)
