"""Random labels (a baseline of Golatkar et al. 2020, arXiv:1911.04933, in the form of Fan et al. 2024,
arXiv:2310.12508): CE(retain) + CE(forget, y'), y' uniform over all classes, drawn anew in every step.

For any forget set.

Differs: two forwards in one step, retain first, where published code learns one after the other or both in one batch,
and the protocol's Adam, whose moments the two terms share, in place of SGD.

Values: none.

Reads: retain, forget images.
"""

from jaxunlearn.ingredients.labels import random_labels
from jaxunlearn.methods.rule import loss_rule, relabelled


@loss_rule
def rule(student, retain, forget):
    drawn = random_labels(student.random_key(), forget.labels, student.context.num_classes)
    return relabelled(student, retain, forget, drawn)
