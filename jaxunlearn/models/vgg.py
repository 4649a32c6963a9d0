"""VGG-16 with batch normalisation for 32x32 images (Simonyan & Zisserman, configuration D), small classifier."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxunlearn.models.layers import BatchNorm, Conv, Linear, conv_norm, parameter_dtype
from jaxunlearn.ops.fused import Image, pooled, written

# Features of each 3x3 convolution, block by block; a 2x2 max-pool ends each block.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16BN(nn.Module):
    """13 bias-free conv-BatchNorm-ReLU, five max-pools to 1x1, then 512-512, ReLU, dropout 0.5, 512-classes.

    15,032,868 parameters at 100 classes. Layer names count as torchvision's `features`: convolution, BatchNorm, ReLU
    and pool each take a number.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Array:
        """Images [B, 32, 32, 3] -> logits [B, num_classes], float32. In train mode needs the `dropout` key."""
        number = 0
        for block in BLOCKS:
            for features in block:
                conv = Conv(features, dtype=self.dtype, name=f"features.{number}")
                norm = BatchNorm(self.dtype, name=f"features.{number + 1}")
                x = conv_norm(conv, norm, x, train, relu=True)
                number += 3
            x = pooled(x)
            number += 1
        flat = written(x).reshape(x.shape[0], -1)
        y = nn.relu(Linear(512, self.dtype, name="classifier.0")(flat))
        y = nn.Dropout(0.5, deterministic=not train)(y)
        return Linear(self.num_classes, parameter_dtype(self.dtype), name="classifier.3")(y)
