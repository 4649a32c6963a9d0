"""Models that are used as PyTorch's modules are."""

import copy
import dataclasses
import functools
import os
from typing import Any

import jax

from jaxunlearn.benchmarks import Protocol, get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import Network, make_network
from jaxunlearn.models.state_dicts import shortcut
from jaxunlearn.models.torch_weights import load_weights
from jaxunlearn.models.weight_files import read_weights

PyTree = Any


class Generator:
    """The random numbers of a model and its copies, in the order in which they are asked for."""

    def __init__(self, key: jax.Array):
        self.key = key

    def split(self) -> jax.Array:
        """A key that has not been used."""
        self.key, key = jax.random.split(self.key)
        return key


class Model:
    """A network, its variables and its mode, as in PyTorch.

    `params` and `batch_stats` are pytrees and may be replaced by others of the same form. A copy has no gradient: the
    gradient is always that of the model which the optimizer updates. A model is a pytree itself.
    """

    def __init__(
        self, network: Network, params: PyTree, batch_stats: PyTree, generator: Generator, training: bool = True
    ):
        self.network = network
        self.params = params
        self.batch_stats = batch_stats
        self.training = training
        self._generator = generator

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, classes] of images [B, 32, 32, 3]; in train mode with dropout, and the running statistics move.

        Raises UserError for images of another layout.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            hint = "PyTorch's layout is changed by images.transpose(0, 2, 3, 1)"
            raise UserError(f"a model takes images [B, 32, 32, 3], not {list(images.shape)}: {hint}")
        if not self.training:
            return self.network.apply_eval(self.params, self.batch_stats, images)
        key = self.random_key()
        logits, self.batch_stats = self.network.apply_train(self.params, self.batch_stats, images, key)
        return logits

    def train(self, mode: bool = True) -> "Model":
        """Switches to train mode, or with False to eval mode. Returns the model."""
        self.training = mode
        return self

    def eval(self) -> "Model":
        """Switches to eval mode. Returns the model."""
        return self.train(False)

    def parameters(self) -> list[jax.Array]:
        """The parameters, in an order that is the same for all models of a kind."""
        return jax.tree.leaves(self.params)

    def reset_parameters(self) -> None:
        """Draws new parameters. BatchNorm's running statistics stay."""
        key = self._generator.key  # itself, not a split of it: the rule `bad_teacher` draws from it too
        self._generator.split()
        self.params, _ = self.network.initialise(key)

    def reset_running_stats(self) -> None:
        """Sets BatchNorm's running means to 0 and variances to 1."""
        _, self.batch_stats = self.network.initialise(jax.random.key(0))

    def random_key(self) -> jax.Array:
        """A new key for `jax.random`, where PyTorch would draw from its global generator."""
        return self._generator.split()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        twin = copy.copy(self)
        twin.params = jax.lax.stop_gradient(self.params)  # arrays never change, so they need no copies
        return twin


jax.tree_util.register_pytree_node(
    Model,
    lambda model: ((model.params, model.batch_stats), (model.network, model._generator, model.training)),
    lambda static, arrays: Model(static[0], *arrays, *static[1:]),
)


def resnet20(*, num_classes: int = 10, weights: str | os.PathLike[str] | None = None, seed: int = 0) -> Model:
    """ResNet-20 in train mode: from a file of a PyTorch state_dict, which says which shortcut it has, or random.

    Raises UserError for a file that cannot be read or is not of this model.
    """
    return _make("resnet20-cifar10-class0", num_classes, weights, seed)


def vgg16_bn(*, num_classes: int = 100, weights: str | os.PathLike[str] | None = None, seed: int = 0) -> Model:
    """VGG-16 with BatchNorm; otherwise like `resnet20`."""
    return _make("vgg16bn-cifar100-class0", num_classes, weights, seed)


def mobilenet_v2(*, num_classes: int = 10, weights: str | os.PathLike[str] | None = None, seed: int = 0) -> Model:
    """MobileNetV2; otherwise like `resnet20`."""
    return _make("mobilenetv2-fmnist-class0", num_classes, weights, seed)


def _make(bench: str, num_classes: int, weights: str | os.PathLike[str] | None, seed: int) -> Model:
    protocol = get_benchmark(bench)
    if weights is not None and protocol.model == "resnet20":
        protocol = dataclasses.replace(protocol, resnet_shortcut=shortcut(read_weights(weights)))
    network, key = _network(protocol, num_classes), jax.random.key(seed)
    if weights is None:
        return Model(network, *network.initialise(key), Generator(key))
    params, batch_stats = jax.eval_shape(network.initialise, key)
    variables = load_weights(weights, {"params": params, "batch_stats": batch_stats})
    return Model(network, variables["params"], variables["batch_stats"], Generator(key))


@functools.cache
def _network(protocol: Protocol, num_classes: int) -> Network:
    return jitted(make_network(protocol, num_classes))


def jitted(network: Network) -> Network:
    """The network with each of its functions jitted: traced once, however often it is called."""
    return Network(jax.jit(network.initialise), jax.jit(network.apply_train), jax.jit(network.apply_eval))
