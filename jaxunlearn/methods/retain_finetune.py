"""Finetuning on what is kept: CE(retain). The forget batch is never looked at, so BatchNorm sees retain images only.

Reads: retain.
"""

from jaxunlearn.methods.rule import accuracy, cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget):
    logits = student(retain.images)
    return cross_entropy(logits, retain.labels), {"accuracy": accuracy(logits, retain.labels)}
