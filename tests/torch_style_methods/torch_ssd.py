"""SSD (Foster et al. 2023, arXiv:2308.07707): weights that matter more for the forgotten class than for all classes are
made smaller, once. Nothing is learned.

The importance for all is that of batches of retain with the forgotten class in its proportion, as a shuffled set has
them: of batches of one class each it could never be a tenth of the importance for the forgotten one.
"""

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

        share = len(forget_set) / (len(retain_set) + len(forget_set))

        def loss(batch):
            return cross_entropy(model(batch.images), batch.labels)

        def importance(closures):
            """The mean of the squared gradients of losses."""
            total, count = jax.tree.map(jnp.zeros_like, dict(model.named_parameters())), 0
            for closure in closures:
                _, gradients = optimizer.gradients(closure)
                total, count = jax.tree.map(lambda sum, gradient: sum + gradient**2, total, gradients), count + 1
            return jax.tree.map(lambda sum: sum / count, total)

        pairs = zip(retain_set, itertools.cycle(forget_set), strict=False)
        everything = importance(lambda r=r, f=f: (1 - share) * loss(r) + share * loss(f) for r, f in pairs)
        forgotten = importance(lambda batch=batch: loss(batch) for batch in forget_set)

        def dampened(name, weight):
            factor = self.dampening * everything[name] / jnp.maximum(forgotten[name], 1e-30)
            return jnp.where(forgotten[name] > self.alpha * everything[name], weight * jnp.minimum(factor, 1), weight)

        model.load_state_dict({name: dampened(name, weight) for name, weight in model.named_parameters()})

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        return {"loss": cross_entropy(model.eval()(retain_batch.images), retain_batch.labels)}
