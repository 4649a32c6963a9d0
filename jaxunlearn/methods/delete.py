"""DELETE (Zhou et al. 2025, arXiv:2503.23751): KL(t || student) on forget, where t is the pretrained model's softmax
over the classes that are not an image's own.

Made for whole classes where no retain images are left; BatchNorm sees forget images alone.

Differs: the protocol's Adam, whose steps are larger and stay so when the gradient has become small, in place of SGD
1e-4 (5e-5 for CIFAR-100 and VGG) with momentum 0.9.

Values: none.

Reads: forget.
"""

import jax

from jaxunlearn.ingredients.labels import other_classes
from jaxunlearn.methods.rule import kl_divergence, loss_rule


@loss_rule
def rule(student, retain, forget):
    others = other_classes(student.teacher(forget.images), forget.labels)
    return kl_divergence(jax.nn.softmax(others), student(forget.images))
