"""Models that are used as PyTorch's modules are."""

import copy
import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxunlearn.benchmarks import Protocol, get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import Network, make_network
from jaxunlearn.models.state_dicts import shortcut
from jaxunlearn.models.torch_weights import TORCH_NAME, fit_weights
from jaxunlearn.models.weight_files import read_weights
from jaxunlearn.randomness import seed_key

PyTree = Any


class Generator:
    """The random numbers of a model and its copies, in the order in which they are asked for."""

    def __init__(self, key: jax.Array):
        self.key = key

    def split(self) -> jax.Array:
        """A key that has not been used."""
        self.key, key = jax.random.split(self.key)
        return key


_ATTRIBUTES = ("network", "params", "batch_stats", "training", "_generator", "_batch_norm")


class Model:
    """A network, its variables and its mode, as in PyTorch.

    `params` and `batch_stats` are pytrees and may be replaced by others of the same form. A copy has no gradient: the
    gradient is always that of the model which the optimizer updates. A model is a pytree itself.

    The names of parameters and running statistics are those of a PyTorch state_dict, such as `conv1.weight`; the arrays
    are JAX's: a convolution's weight is [height, width, in, out], a linear layer's [in, out].
    """

    def __init__(
        self,
        network: Network,
        params: PyTree,
        batch_stats: PyTree,
        generator: Generator,
        training: bool = True,
        batch_norm: bool = True,
    ):
        self.network = network
        self.params = params
        self.batch_stats = batch_stats
        self.training = training
        self._generator = generator
        self._batch_norm = batch_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES:  # it would be lost
            raise AttributeError(f"'Model' object has no attribute '{name}'", name=name, obj=self)
        super().__setattr__(name, value)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, classes] of images [B, 32, 32, 3]; in train mode with dropout, and the running statistics move.

        Raises UserError for images of another layout.
        """
        return self.with_features(images)[0]

    def with_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [B, classes] as `model(images)` gives them, and the features [B, width] before the last layer."""
        if images.ndim != 4 or images.shape[-1] != 3:
            hint = "PyTorch's layout is changed by images.transpose(0, 2, 3, 1)"
            raise UserError(f"a model takes images [B, 32, 32, 3], not {list(images.shape)}: {hint}")
        key = self.random_key() if self.training else self._generator.key
        mode = (self.training, self._batch_norm)
        after = self.network.forward(self.params, self.batch_stats, images, key, *mode)
        if all(mode):
            self.batch_stats = after.batch_stats
        return after.logits, after.features

    def train(self, mode: bool = True, *, batch_norm: bool = True) -> "Model":
        """Switches to train mode, or with False to eval mode. Returns the model.

        With `batch_norm` False BatchNorm alone is in eval mode: it uses its running statistics and keeps them.
        """
        self.training, self._batch_norm = mode, batch_norm
        return self

    def eval(self) -> "Model":
        """Switches to eval mode. Returns the model."""
        return self.train(False)

    def parameters(self) -> list[jax.Array]:
        """The parameters, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, jax.Array]]:
        """The parameters with their names, in the order in which the layers compute."""
        return list(self.named(self.params).items())

    def state_dict(self) -> dict[str, jax.Array]:
        """The parameters and running statistics by name."""
        return self.named(self.params) | self.named(self.batch_stats)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the parameters and running statistics that `state` names.

        Raises UserError for a name that the model has not, and an array of another shape.
        """
        known = self.state_dict()
        if unknown := sorted(state.keys() - known.keys()):
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)[0]
            raise UserError(f"the model has no '{unknown[0]}': did you mean '{nearest}'? (state_dict() has them all)")
        self.params, self.batch_stats = replaced(self.params, state), replaced(self.batch_stats, state)

    def named(self, tree: PyTree) -> dict[str, jax.Array]:
        """The arrays of a tree like `params` or `batch_stats` by name, in the order in which the layers compute."""
        layers = [(layer, tree[layer]) for layer in self.network.layers() if layer in tree]
        return {_name(layer, leaf): arrays[leaf] for layer, arrays in layers for leaf in TORCH_NAME if leaf in arrays}

    def reset_parameters(self) -> None:
        """Draws new parameters. BatchNorm's running statistics stay."""
        key = self._generator.key  # itself, not a split of it: the rule `bad_teacher` draws from it too
        self._generator.split()
        self.params, _ = self.network.initialise(key)

    def reset_running_stats(self) -> None:
        """Sets BatchNorm's running means to 0 and variances to 1."""
        _, self.batch_stats = self.network.initialise(seed_key(0))

    def random_key(self) -> jax.Array:
        """A new key for `jax.random`, where PyTorch would draw from its global generator."""
        return self._generator.split()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        twin = copy.copy(self)
        twin.params = jax.lax.stop_gradient(self.params)  # arrays never change, so they need no copies
        return twin


def _flatten(model: Model) -> tuple[tuple[PyTree, PyTree], tuple[Any, ...]]:
    static = (model.network, model._generator, model.training, model._batch_norm)
    return (model.params, model.batch_stats), static


jax.tree_util.register_pytree_node(Model, _flatten, lambda static, arrays: Model(static[0], *arrays, *static[1:]))


def _name(layer: str, leaf: str) -> str:
    return f"{layer}.{TORCH_NAME[leaf]}"


def replaced(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """A tree {layer: {leaf: array}} with other arrays in the places that `arrays` names."""

    def at(path: tuple[Any, ...], old: jax.Array) -> jax.Array:
        name = _name(path[0].key, path[1].key)
        new = jnp.asarray(arrays.get(name, old), old.dtype)
        if new.shape != old.shape:
            raise UserError(f"'{name}' is {list(old.shape)} in the model, not {list(new.shape)}")
        return new

    return jax.tree_util.tree_map_with_path(at, tree)


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
    arrays = None if weights is None else read_weights(weights)
    if arrays is not None and protocol.model == "resnet20":
        protocol = dataclasses.replace(protocol, resnet_shortcut=shortcut(arrays))
    network, key = _network(protocol, num_classes), seed_key(seed)
    if weights is None or arrays is None:
        return Model(network, *network.initialise(key), Generator(key))
    params, batch_stats = jax.eval_shape(network.initialise, key)
    variables = fit_weights(weights, arrays, {"params": params, "batch_stats": batch_stats})
    return Model(network, variables["params"], variables["batch_stats"], Generator(key))


@functools.cache
def _network(protocol: Protocol, num_classes: int) -> Network:
    return jitted(make_network(protocol, num_classes))


def jitted(network: Network) -> Network:
    """The network with each of its functions jitted: traced once, however often it is called."""
    return Network(
        initialise=jax.jit(network.initialise),
        apply_train=jax.jit(network.apply_train),
        apply_eval=jax.jit(network.apply_eval),
        forward=jax.jit(network.forward, static_argnums=(4, 5)),
        layers=functools.cache(network.layers),
    )
