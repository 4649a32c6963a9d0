"""MobileNetV2 for 32x32 images (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks"), ReLU."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxunlearn.models.layers import BatchNorm, Conv, Linear, conv_norm, parameter_dtype
from jaxunlearn.ops.fused import Image, written


def stages(stride: int) -> tuple[tuple[int, int, int, int], ...]:
    """(expansion, channels, blocks, stride of the first block) of each stage: Table 2, with strides for 32x32 images.

    `stride` is that of the 24-channel stage.
    """
    return (
        (1, 16, 1, 1),
        (6, 24, 2, stride),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )


class MobileNetV2(nn.Module):
    """Width 1.0, stem of stride 1, seven stages of inverted residuals, 1280-channel head, mean pool, linear.

    ReLU where the paper has ReLU6; `dropout` before the linear layer, by default none. 2,236,682 parameters at 10
    classes. `stride` is that of the 24-channel stage: 1, or 2 (3.6 times fewer multiply-adds). Layer names are
    torchvision's.
    """

    num_classes: int
    stride: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Array:
        """Images [B, 32, 32, 3] -> logits [B, num_classes], float32."""
        x = self._conv_bn("features.0.0", "features.0.1", x, 32, train)
        index = 1
        for expansion, channels, blocks, first_stride in stages(self.stride):
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                x = self._block(f"features.{index}.conv", x, expansion, channels, stride, train)
                index += 1
        x = self._conv_bn(f"features.{index}.0", f"features.{index}.1", x, 1280, train, size=1)
        features = written(x).astype(parameter_dtype(self.dtype)).mean((1, 2))
        features = nn.Dropout(self.dropout, deterministic=not train)(features)
        return Linear(self.num_classes, parameter_dtype(self.dtype), name="classifier.1")(features)

    def _block(self, name: str, x: Image, expansion: int, channels: int, stride: int, train: bool) -> Image:
        """1x1 expansion, depthwise 3x3, linear 1x1 projection; residual when the shape is kept."""
        residual = written(x) if (stride, channels) == (1, x.shape[-1]) else None
        y = x if residual is None else residual
        number, width = 0, expansion * x.shape[-1]
        if expansion != 1:
            y = self._conv_bn(f"{name}.0.0", f"{name}.0.1", y, width, train, size=1)
            number = 1
        y = self._conv_bn(f"{name}.{number}.0", f"{name}.{number}.1", y, width, train, stride=stride, groups=width)
        conv = Conv(channels, 1, dtype=self.dtype, name=f"{name}.{number + 1}")
        norm = BatchNorm(self.dtype, name=f"{name}.{number + 2}")
        return conv_norm(conv, norm, y, train, residual=residual)

    def _conv_bn(
        self,
        conv: str,
        norm: str,
        x: Image,
        features: int,
        train: bool,
        *,
        size: int = 3,
        stride: int = 1,
        groups: int = 1,
    ) -> Image:
        layers = Conv(features, size, stride, groups, self.dtype, name=conv), BatchNorm(self.dtype, name=norm)
        return conv_norm(*layers, x, train, relu=True)
