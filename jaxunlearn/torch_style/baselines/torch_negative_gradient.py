"""`negative_gradient` as a class of the PyTorch harness."""

from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class NegativeGradient(UnlearningMethod):
    def __init__(self, forget_weight: float = 0.5):
        self.forget_weight = forget_weight

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        retain_images, retain_labels = retain_batch
        forget_images, forget_labels = forget_batch

        def closure():
            logits = model(retain_images)
            forget_loss = cross_entropy(model(forget_images), forget_labels)
            return cross_entropy(logits, retain_labels) - self.forget_weight * forget_loss, logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits, retain_labels)}
