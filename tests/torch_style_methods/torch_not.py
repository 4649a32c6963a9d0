"""NoT (Khalil et al. 2025): the weights of the first convolution are negated, then retain is learned."""

from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.torch_style import UnlearningMethod


class NoT(UnlearningMethod):
    def prepare(self, model, retain_set, forget_set, optimizer):
        name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.ndim == 4)
        model.load_state_dict({name: -weight})

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch

        def closure():
            logits = model(images)
            return cross_entropy(logits, labels), logits

        loss, logits = optimizer.step(closure)
        return {"loss": loss, "accuracy": accuracy(logits, labels)}
