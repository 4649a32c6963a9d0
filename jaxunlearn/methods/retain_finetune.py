"""Finetuning on what is kept: CE(retain). The forget batch is never looked at, so BatchNorm sees retain images only.

Differs: nothing.

Values: none.

Reads: retain.
"""

from jaxunlearn.methods.rule import loss_rule, supervised


@loss_rule
def rule(student, retain, forget):
    return supervised(retain)(student)
