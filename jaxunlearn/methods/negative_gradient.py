"""Gradient ascent on what is forgotten beside descent on what is kept: CE(retain) - w CE(forget).

Two forwards in train mode, retain first: BatchNorm's running statistics move twice a step.

Differs: nothing.

Values: the task's.

Reads: retain, forget.
"""

from jaxunlearn.methods.rule import accuracy, cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget, *, forget_weight: float = 0.5):
    logits = student(retain.images)
    loss = cross_entropy(logits, retain.labels)
    loss -= forget_weight * cross_entropy(student(forget.images), forget.labels)
    return loss, {"accuracy": accuracy(logits, retain.labels)}
