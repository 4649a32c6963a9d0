"""`bad_teacher` as a class of the PyTorch harness."""

import copy

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import accuracy, kl_divergence
from jaxunlearn.torch_style import UnlearningMethod


class BadTeacher(UnlearningMethod):
    def __init__(self, reset_bn: bool = False):
        self.reset_bn = reset_bn

    def setup(self, model):
        self.competent = copy.deepcopy(model).eval()
        self.incompetent = copy.deepcopy(model).eval()
        self.incompetent.reset_parameters()
        if self.reset_bn:
            self.incompetent.reset_running_stats()

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        retain_images, retain_labels = retain_batch
        forget_images, _ = forget_batch
        images = jnp.concatenate([retain_images, forget_images])
        targets = jax.nn.softmax(jnp.concatenate([self.competent(retain_images), self.incompetent(forget_images)]))

        def closure():
            logits = model(images)
            return kl_divergence(targets, logits), logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits[: len(retain_labels)], retain_labels)}
