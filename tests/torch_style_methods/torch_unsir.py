"""UNSIR (Tarun et al. 2021, arXiv:2111.08947): images that the model takes least for the forgotten class, learned as of
that class beside retain (impair), then retain alone (repair)."""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class UNSIR(UnlearningMethod):
    def __init__(self, images: int = 32, steps: int = 25, rate: float = 0.1, impair_epochs: int = 1):
        self.images = images
        self.steps = steps
        self.rate = rate
        self.impair_epochs = impair_epochs

    def setup(self, model):
        self.noise = jax.random.normal(model.random_key(), (self.images, 32, 32, 3))
        self.labels = jnp.zeros(self.images, jnp.int32)

    def prepare(self, model, retain_set, forget_set, optimizer):
        model.eval()
        self.labels = jnp.full_like(self.labels, next(iter(forget_set)).labels[0])

        def loss(noise):
            return 0.1 * (noise**2).sum((1, 2, 3)).mean() - cross_entropy(model(noise), self.labels)

        adam = optax.adam(self.rate)
        state = adam.init(self.noise)
        for _ in range(self.steps):
            updates, state = adam.update(jax.grad(loss)(self.noise), state)
            self.noise = optax.apply_updates(self.noise, updates)

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch
        if epoch < self.impair_epochs:
            images, labels = jnp.concatenate([images, self.noise]), jnp.concatenate([labels, self.labels])

        def closure():
            logits = model(images)
            return cross_entropy(logits, labels), logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits, labels)}
