"""GDR-GMA (Lin et al. 2024): descent on retain and ascent on forget, each without what works against the other, mixed
by how good the loss on retain is. From the second epoch on the last layer's ascent is compared with the mean of its
gradients on retain so far."""

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


def rectified(gradient, other):
    """A gradient without its part against another, where they point away from each other."""
    against = jnp.minimum(jnp.vdot(gradient, other), 0)
    return gradient - against / jnp.maximum(jnp.vdot(other, other), 1e-12) * other


class GDRGMA(UnlearningMethod):
    def __init__(self, sharpness: float = 100.0, good: float = 0.02):
        self.sharpness = sharpness
        self.good = good

    def setup(self, model):
        self.bank = {name: jnp.zeros_like(parameter) for name, parameter in model.named_parameters()[-2:]}
        self.count = jnp.zeros(())

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        (images, labels), (forget_images, forget_labels) = retain_batch, forget_batch
        loss, down = optimizer.gradients(lambda: cross_entropy(model(images), labels))
        _, up = optimizer.gradients(lambda: -cross_entropy(model(forget_images), forget_labels))
        means = {name: total / jnp.maximum(self.count, 1) for name, total in self.bank.items()} if epoch > 0 else {}
        weight = jax.nn.sigmoid(self.sharpness * (self.good - loss))

        def mixed(name):
            descent, ascent = rectified(down[name], up[name]), rectified(up[name], means.get(name, down[name]))
            return (1 - weight) * descent + weight * ascent

        optimizer.update({name: mixed(name) for name in down})
        self.bank = {name: total + down[name] for name, total in self.bank.items()}
        self.count += 1
        return {"loss": loss, "weight": weight}
