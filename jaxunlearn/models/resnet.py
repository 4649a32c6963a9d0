"""ResNet-20 for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", section 4.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxunlearn.models.layers import BatchNorm, Conv, Linear, conv_norm, parameter_dtype
from jaxunlearn.ops.fused import Image, written


class ResNet20(nn.Module):
    """3x3/16 stem, stages of 16, 32 and 64 channels with three post-activation blocks each, mean pool, linear.

    `shortcut` says how a block that changes the shape carries its input: "B", 1x1 convolution and BatchNorm
    (272,474 parameters at 10 classes); "A", every second pixel, zero channels on both sides, no parameters (269,722).
    """

    num_classes: int
    shortcut: str = "B"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Array:
        """Images [B, 32, 32, 3] -> logits [B, num_classes], float32."""
        x = self._conv_norm("conv1", "bn1", x, 16, train, relu=True)
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range(3):
                stride = 2 if stage > 1 and block == 0 else 1
                x = self._block(f"layer{stage}.{block}", x, channels, stride, train)
        features = written(x).astype(parameter_dtype(self.dtype)).mean((1, 2))
        return Linear(self.num_classes, parameter_dtype(self.dtype), name="linear")(features)

    def _block(self, name: str, x: Image, channels: int, stride: int, train: bool) -> Image:
        x = residual = written(x)
        y = self._conv_norm(f"{name}.conv1", f"{name}.bn1", x, channels, train, stride=stride, relu=True)
        if (stride, channels) != (1, x.shape[-1]) and self.shortcut == "A":
            pad = (channels - x.shape[-1]) // 2
            residual = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))
        elif (stride, channels) != (1, x.shape[-1]):
            names = f"{name}.shortcut.0", f"{name}.shortcut.1"
            residual = written(self._conv_norm(*names, x, channels, train, kernel_size=1, stride=stride))
        return self._conv_norm(f"{name}.conv2", f"{name}.bn2", y, channels, train, relu=True, residual=residual)

    def _conv_norm(
        self,
        conv: str,
        norm: str,
        x: Image,
        channels: int,
        train: bool,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        relu: bool = False,
        residual: Array | None = None,
    ) -> Image:
        layers = Conv(channels, kernel_size, stride, dtype=self.dtype, name=conv), BatchNorm(self.dtype, name=norm)
        return conv_norm(*layers, x, train, relu, residual)
