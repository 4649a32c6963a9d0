"""Boundary Shrink (Chen et al. 2023, CVPR, "Boundary Unlearning"): CE(forget, y'), y' the class that the pretrained
model f0 answers to the image after an attack: argmax f0(x + eps sign grad_x CE(f0(x), y)).

The attack is one step of FGSM of `eps` in pixels from 0 to 1; the attacked image is brought back to [0, 1] and to whole
steps of 1/255. Where the attack fails, y' is the image's own label, which is then learned. For whole classes; BatchNorm
sees forget images alone.

Differs: the attack is on the batch as it comes, augmented, and on each of three channels also where the image is grey,
and the protocol's Adam stands for SGD.

Values: the paper's.

Reads: forget.
"""

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import cross_entropy, loss_rule

ranges = {"eps": (0.01, 0.3)}


@loss_rule
def rule(student, retain, forget, *, eps: float = 0.1):
    def pretrained(images):
        return student.context.apply_eval(*student.state.extra, images)

    mean, std = jnp.array(student.context.mean), jnp.array(student.context.std)
    uphill = jnp.sign(jax.grad(lambda images: cross_entropy(pretrained(images), forget.labels))(forget.images))
    pixels = jnp.clip(forget.images * std + mean + eps * uphill, 0, 1)
    attacked = (jnp.round(pixels * 255) / 255 - mean) / std
    return cross_entropy(student(forget.images), pretrained(attacked).argmax(-1))
