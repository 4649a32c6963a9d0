"""Gradient ascent (the baseline GA of Fan et al. 2024, arXiv:2310.12508, after Thudi et al. 2022, arXiv:2109.13398):
-CE(forget).

For any forget set. The loss has no lower end: expect a collapsed model. BatchNorm sees forget images alone.

Differs: the protocol's Adam, which makes whole steps of 1e-3 of any gradient, in place of SGD 1e-4 for 5 epochs.

Values: none.

Reads: forget.
"""

from jaxunlearn.methods.rule import cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget):
    return -cross_entropy(student(forget.images), forget.labels)
