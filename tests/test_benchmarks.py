import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxunlearn.benchmarks import BENCHMARKS, PRETRAIN_FIELDS, Protocol, get_benchmark, validate
from jaxunlearn.data.sources import DATASETS
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import abstract_key

OFFICIAL = {
    "model": "resnet20",
    "dataset": "cifar10",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "forget_class": 0,
    "train_limit": None,
    "validation": False,
    "init_weights": None,
    "batch_size": 128,
    "drop_last": False,
    "crop_pixels": 4,
    "crop_padding": "zero",
    "flip": True,
    "mia_augment": False,
    "resnet_shortcut": "B",
    "mobilenet_stride": 1,
    "precision": "fp32",
    "pretrain_epochs": 80,
    "pretrain_lr": 0.1,
    "pretrain_momentum": 0.9,
    "pretrain_weight_decay": 5e-4,
    "unlearn_epochs": 20,
    "epoch_length": "min",
    "unlearn_lr": 1e-3,
    "unlearn_augment": True,
    "mobilenet_dropout": 0.0,
    "pretrain_schedule": "cosine",
    "pretrain_nesterov": False,
    "adam_b1": 0.9,
    "adam_b2": 0.999,
    "adam_eps": 1e-8,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("resnet20-cifar10-class0", {}),
        (
            "vgg16bn-cifar100-class0",
            {
                "model": "vgg16bn",
                "dataset": "cifar100",
                "mean": (0.5071, 0.4867, 0.4408),
                "std": (0.2675, 0.2565, 0.2761),
            },
        ),
        (
            "mobilenetv2-fmnist-class0",
            {"model": "mobilenetv2", "dataset": "fashion_mnist", "mean": (0.2860,) * 3, "std": (0.3530,) * 3},
        ),
    ],
)
def test_official_constants(name, own):
    assert dataclasses.asdict(get_benchmark(name)) == OFFICIAL | own


def test_every_benchmark_is_valid_and_hashable():
    for protocol in BENCHMARKS.values():
        validate(protocol, 10)
        hash(protocol)


def test_a_model_takes_another_data_set():
    protocol = BENCHMARKS["vgg16bn-cifar10-class0"]
    classes = DATASETS[protocol.dataset].num_classes
    network = make_network(protocol, classes)
    variables = jax.eval_shape(network.initialise, abstract_key())
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(network.apply_eval, *variables, images).shape == (2, classes)


def test_pretrain_fields_are_fields_that_unlearning_does_not_own():
    fields = {field.name for field in dataclasses.fields(Protocol)}
    assert set(PRETRAIN_FIELDS) < fields
    unlearning = {"unlearn_epochs", "epoch_length", "unlearn_augment", "unlearn_lr", "adam_b1", "adam_b2", "adam_eps"}
    assert fields - set(PRETRAIN_FIELDS) == unlearning | {"mia_augment", "forget_class", "init_weights"}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg16-cifar100", "vgg16bn-cifar100-class0"),
        ("vgg16-cifar10", "vgg16bn-cifar10-class0"),
        ("vgg16bn-cifar100", "vgg16bn-cifar100-class0"),
        ("cifar100", "vgg16bn-cifar100-class0"),
        ("resnet20-cifar10-class1", "resnet20-cifar10-class0"),
        ("", "resnet20-cifar10-class0"),
    ],
)
def test_unknown_benchmark_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match=rf"'{name}'.*did you mean '{nearest}'"):
        get_benchmark(name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch_length", "max", "epoch_length is 'max': choose from min, retain"),
        ("crop_padding", "edge", "choose from zero, reflect"),
        ("resnet_shortcut", "C", "choose from B, A"),
        ("mobilenet_stride", 3, "choose from 1, 2"),
        ("mobilenet_stride", 2, "mobilenet_stride is 2: resnet20 has none, it is mobilenetv2's alone"),
        ("precision", "fp16", "choose from fp32, tf32, bf16"),
        ("pretrain_schedule", "step", "choose from cosine, constant"),
        *(
            (name, 0, f"{name} is 0: it must be at least 1")
            for name in ("pretrain_epochs", "unlearn_epochs", "batch_size")
        ),
        *(
            (name, value, f"{name} is .*: it must be a positive number")
            for name in ("pretrain_lr", "unlearn_lr", "adam_eps")
            for value in (0.0, -1e-3, float("inf"), float("nan"))
        ),
        *(
            (name, value, f"{name} is .*: it must be at least 0 and less than 1")
            for name in ("pretrain_momentum", "mobilenet_dropout", "adam_b1", "adam_b2")
            for value in (-0.1, 1.0, float("nan"))
        ),
        ("pretrain_weight_decay", -1e-4, "it must be 0 or more"),
        ("pretrain_weight_decay", float("nan"), "it must be 0 or more"),
        ("crop_pixels", -1, "it must be from 0 to 31"),
        ("crop_pixels", 32, "it must be from 0 to 31"),
        ("forget_class", -1, "forget class -1 does not exist: cifar10 has .*0 to 9"),
        ("forget_class", 10, "forget class 10 does not exist: cifar10 has .*0 to 9"),
        ("train_limit", 9, "train_limit is 9: cifar10 needs at least 10, one image a class"),
        ("mean", (0.5,), "three values each"),
        ("std", (0.5, 0.5), "three values each"),
        ("std", (0.5, 0.0, 0.5), "std must be positive"),
    ],
)
def test_a_value_no_run_can_have_is_refused(name, value, message):
    protocol = dataclasses.replace(get_benchmark("resnet20-cifar10-class0"), **{name: value})
    with pytest.raises(UserError, match=message) as caught:
        validate(protocol, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_pixels", 0), ("crop_pixels", 31), ("forget_class", 9), ("train_limit", 10), ("pretrain_weight_decay", 0.0),
     ("pretrain_momentum", 0.0), ("batch_size", 1)],
)  # fmt: skip
def test_the_last_allowed_value_is_allowed(name, value):
    validate(dataclasses.replace(get_benchmark("resnet20-cifar10-class0"), **{name: value}), 10)


def test_given_weights_are_not_asked_about_images_that_they_may_have_seen():
    protocol = dataclasses.replace(get_benchmark("resnet20-cifar10-class0"), validation=True, init_weights="a hash")
    with pytest.raises(UserError, match="given weights may have seen"):
        validate(protocol, 10)
