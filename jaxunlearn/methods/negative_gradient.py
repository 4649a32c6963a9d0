"""Gradient ascent on what is forgotten beside descent on what is kept: CE(retain) - w CE(forget).

Two forwards in train mode, retain first: BatchNorm's running statistics move twice a step.
"""

from jaxunlearn.methods.rule import cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget, *, forget_weight: float = 0.5):
    retain_loss = cross_entropy(student(retain.images), retain.labels)
    return retain_loss - forget_weight * cross_entropy(student(forget.images), forget.labels)
