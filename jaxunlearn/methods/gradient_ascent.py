"""Gradient ascent (the baseline GA of Fan et al. 2024, arXiv:2310.12508, after Thudi et al. 2022, arXiv:2109.13398):
-CE(forget).

For any forget set; published with SGD 1e-4 for 5 epochs. The fixed Adam makes whole steps of 1e-3 of any gradient, and
the loss has no lower end: expect a collapsed model. BatchNorm sees forget images alone.

Reads: forget.
"""

from jaxunlearn.methods.rule import cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget):
    return -cross_entropy(student(forget.images), forget.labels)
