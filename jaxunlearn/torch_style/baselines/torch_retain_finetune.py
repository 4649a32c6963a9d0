"""`retain_finetune` as a class of the PyTorch harness."""

from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class RetainFinetune(UnlearningMethod):
    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch

        def closure():
            logits = model(images)
            return cross_entropy(logits, labels), logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits, labels)}
