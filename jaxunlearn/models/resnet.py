"""ResNet-20 for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", section 4.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxunlearn.models.layers import BatchNorm, Conv, Linear, parameter_dtype
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
    def __call__(self, x: Array, train: bool) -> Array:
        """Images [B, 32, 32, 3] -> logits [B, num_classes], float32."""
        x = Conv(16, dtype=self.dtype, name="conv1")(x)
        x = BatchNorm(dtype=self.dtype, name="bn1")(x, train, relu=True)
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range(3):
                stride = 2 if stage > 1 and block == 0 else 1
                x = self._block(f"layer{stage}.{block}", x, channels, stride, train)
        x = written(x).astype(parameter_dtype(self.dtype)).mean((1, 2))
        return Linear(self.num_classes, parameter_dtype(self.dtype), name="linear")(x)

    def _block(self, name: str, x: Image, channels: int, stride: int, train: bool) -> Image:
        x = written(x)
        y = Conv(channels, stride=stride, dtype=self.dtype, name=f"{name}.conv1")(x)
        y = BatchNorm(dtype=self.dtype, name=f"{name}.bn1")(y, train, relu=True)
        y = Conv(channels, dtype=self.dtype, name=f"{name}.conv2")(y)
        keeps = stride == 1 and x.shape[-1] == channels
        if not keeps and self.shortcut == "A":
            pad = (channels - x.shape[-1]) // 2
            x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))
        elif not keeps:
            x = Conv(channels, kernel_size=1, stride=stride, dtype=self.dtype, name=f"{name}.shortcut.0")(x)
            x = BatchNorm(dtype=self.dtype, name=f"{name}.shortcut.1")(x, train)
        return BatchNorm(dtype=self.dtype, name=f"{name}.bn2")(y, train, relu=True, residual=x)
