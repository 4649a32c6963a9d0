"""Reverse cross-entropy: CE(retain) - mean log(1 - p_y(forget)), y an image's own label.

Its gradient with respect to the logits of a forget image is p - q, q the model's own softmax over the other classes: it
teaches what DELETE (arXiv:2503.23751) does with the model itself as its teacher, and vanishes as p_y does. Two forwards
in one step, retain first. For any forget set.

Differs: nothing, since it has no paper of its own.

Values: none.

Reads: retain, forget.
"""

import jax
import jax.numpy as jnp

from jaxunlearn.ingredients.labels import other_classes
from jaxunlearn.methods.rule import accuracy, cross_entropy, loss_rule


@loss_rule
def rule(student, retain, forget):
    logits, forget_logits = student(retain.images), student(forget.images)
    own = jnp.take_along_axis(forget_logits, forget.labels[:, None], -1)[:, 0]
    others = jax.nn.logsumexp(other_classes(forget_logits, forget.labels), -1)
    # -log(1 - p) is log(1 + p / (1 - p)), which neither a p of 1 nor one of 0 makes inexact.
    loss = cross_entropy(logits, retain.labels) + jax.nn.softplus(own - others).mean()
    return loss, {"accuracy": accuracy(logits, retain.labels)}
