"""SalUn (Fan et al. 2023, arXiv:2310.12508): random labels for the forgotten class, learned by half of the weights:
those in which its loss is steepest before the first step."""

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class SalUn(UnlearningMethod):
    def __init__(self, share: float = 0.5):
        self.share = share

    def setup(self, model):
        self.mask = {name: jnp.ones_like(parameter) for name, parameter in model.named_parameters()}

    def prepare(self, model, retain_set, forget_set, optimizer):
        model.eval()
        total = jax.tree.map(jnp.zeros_like, self.mask)
        for batch in forget_set:
            _, gradients = optimizer.gradients(lambda batch=batch: cross_entropy(model(batch.images), batch.labels))
            total = jax.tree.map(jnp.add, total, gradients)
        slopes = jax.tree.map(jnp.abs, total)
        least = jnp.quantile(jnp.concatenate([slope.ravel() for slope in slopes.values()]), 1 - self.share)
        self.mask = jax.tree.map(lambda slope: (slope >= least).astype(slope.dtype), slopes)

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        (images, labels), (forget_images, forget_labels) = retain_batch, forget_batch

        def closure():
            logits, forget_logits = model(images), model(forget_images)
            others = jax.random.randint(model.random_key(), forget_labels.shape, 0, logits.shape[-1])
            return cross_entropy(logits, labels) + cross_entropy(forget_logits, others), logits

        (loss, logits), gradients = optimizer.gradients(closure)
        optimizer.update(jax.tree.map(jnp.multiply, gradients, self.mask))
        return {"loss": loss, "accuracy": accuracy(logits, labels)}
