"""Finetuning on what is kept: CE(retain). The forget batch is never looked at, so BatchNorm sees retain images only."""

from jaxunlearn.methods.rule import cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget):
    return cross_entropy(student(retain.images), retain.labels)
