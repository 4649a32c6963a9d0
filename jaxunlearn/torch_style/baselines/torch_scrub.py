"""`scrub` as a class of the PyTorch harness."""

import copy

import jax

from jaxunlearn.methods.rule import accuracy, cross_entropy, kl_divergence
from jaxunlearn.torch_style import UnlearningMethod


class Scrub(UnlearningMethod):
    def __init__(self, temperature: float = 4.0, gamma: float = 0.99, alpha: float = 0.01, forget_epochs: int = 2):
        self.temperature = temperature
        self.gamma = gamma
        self.alpha = alpha
        self.forget_epochs = forget_epochs

    def setup(self, model):
        self.teacher = copy.deepcopy(model).eval()

    def distance(self, images, logits):
        targets = jax.nn.softmax(self.teacher(images) / self.temperature)
        return self.temperature**2 * kl_divergence(targets, logits / self.temperature)

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        retain_images, retain_labels = retain_batch
        forget_images, _ = forget_batch
        if epoch < self.forget_epochs:
            optimizer.step(lambda: -self.distance(forget_images, model(forget_images)))

        def closure():
            logits = model(retain_images)
            loss = self.gamma * cross_entropy(logits, retain_labels)
            return loss + self.alpha * self.distance(retain_images, logits), logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits, retain_labels)}
