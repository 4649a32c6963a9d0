"""SSD (Foster et al. 2023, arXiv:2308.07707): weights that matter more for the forgotten class than for all classes are
made smaller, once. Nothing is learned."""

import itertools

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class SSD(UnlearningMethod):
    def __init__(self, alpha: float = 10.0, dampening: float = 1.0):
        self.alpha = alpha
        self.dampening = dampening

    def prepare(self, model, retain_set, forget_set, optimizer):
        model.eval()

        def importance(batches):
            """The mean of the squared gradients of batches."""
            total, count = jax.tree.map(jnp.zeros_like, dict(model.named_parameters())), 0
            for batch in batches:
                _, gradients = optimizer.gradients(lambda batch=batch: cross_entropy(model(batch.images), batch.labels))
                total, count = jax.tree.map(lambda sum, gradient: sum + gradient**2, total, gradients), count + 1
            return jax.tree.map(lambda sum: sum / count, total)

        everything, forgotten = importance(itertools.chain(retain_set, forget_set)), importance(forget_set)

        def dampened(name, weight):
            share = self.dampening * everything[name] / jnp.maximum(forgotten[name], 1e-30)
            return jnp.where(forgotten[name] > self.alpha * everything[name], weight * jnp.minimum(share, 1), weight)

        model.load_state_dict({name: dampened(name, weight) for name, weight in model.named_parameters()})

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        return {"loss": cross_entropy(model.eval()(retain_batch.images), retain_batch.labels)}
