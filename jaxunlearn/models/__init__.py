"""The models of the benchmarks: registry, construction, PyTorch weights.

A model maps images [B, 32, 32, 3] to logits [B, classes]; its submodules are flat and named as PyTorch names them
(`params["layer1.0.conv1"]["kernel"]` is PyTorch's `layer1.0.conv1.weight`), see `torch_weights`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxunlearn.errors import UserError
from jaxunlearn.models.mobilenet import MobileNetV2
from jaxunlearn.models.resnet import ResNet20
from jaxunlearn.models.vgg import VGG16BN

MODELS: dict[str, Callable[..., nn.Module]] = {"resnet20": ResNet20, "vgg16bn": VGG16BN, "mobilenetv2": MobileNetV2}


def build(
    name: str,
    num_classes: int,
    *,
    resnet_shortcut: str = "B",
    mobilenet_stride: int = 1,
    mobilenet_dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> nn.Module:
    """The model called `name`, computing in `dtype` (parameters, statistics and logits stay float32 or wider).

    `resnet_shortcut` ("B" or "A"), `mobilenet_stride` (1 or 2) and `mobilenet_dropout` matter to their model only.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r}: the models are {', '.join(sorted(MODELS))}")
    if resnet_shortcut not in ("A", "B"):
        raise UserError(f"no ResNet shortcut {resnet_shortcut!r}: 'A' or 'B'")
    if mobilenet_stride not in (1, 2):
        raise UserError(f"no MobileNetV2 stride {mobilenet_stride}: 1 or 2")
    options: dict[str, dict[str, object]] = {
        "resnet20": {"shortcut": resnet_shortcut},
        "mobilenetv2": {"stride": mobilenet_stride, "dropout": mobilenet_dropout},
    }
    return MODELS[name](num_classes=num_classes, dtype=dtype, **options.get(name, {}))
