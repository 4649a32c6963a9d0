"""state_dicts for the tests that read them: of a model's names and shapes, with values of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.models import build
from jaxunlearn.models.torch_weights import to_state_dict


@functools.cache
def shapes(name="resnet20", classes=10, **options):
    model = build(name, classes, **options)
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))


def random_state(variables, seed=0):
    """A state_dict of the right names and shapes with values of its own, made without the code under test's values."""
    rng = np.random.default_rng(seed)
    empty = to_state_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables))
    return {key: rng.uniform(0.5, 1.5, value.shape).astype(np.float32) / 8 for key, value in empty.items()}


def resnet_layers(blocks=3, shortcut="B"):
    """The layers of a ResNet-20, or one with other blocks a stage, in the order in which PyTorch's own classes have
    them."""
    yield from ("conv1", "bn1")
    for stage in (1, 2, 3):
        for block in range(blocks):
            yield from (f"layer{stage}.{block}.{name}" for name in ("conv1", "bn1", "conv2", "bn2"))
            if stage > 1 and block == 0 and shortcut == "B":
                yield from (f"layer{stage}.0.shortcut.{number}" for number in (0, 1))
    yield "linear"


def renamed(state, names):
    """`state` with its layers in the order of `names`, {layer: other name}."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {
        f"{other}.{leaf}": state[f"{layer}.{leaf}"]
        for layer, other in names.items()
        for leaf in leaves
        if f"{layer}.{leaf}" in state
    }
