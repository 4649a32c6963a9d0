"""Bad teaching (Chundawat et al. 2023, arXiv:2205.08096): KL(t || student) on the retain and forget images together,
where t is the pretrained model's softmax on retain images and a random model's on forget images; T = 1.

The random model is the same network with fresh parameters. `reset_bn=True` gives it fresh running statistics too.

What it says under the trained statistics depends on its draw and hardly on the image: of eight draws on a ResNet-20 and
eight on a VGG-16-BN each answered one to seven classes with probability 1, one of ResNet-20's mostly the forgotten
class itself and one nothing else.

Differs: as in the task's baseline the random model keeps the trained BatchNorm running statistics, which do not fit its
weights (on MobileNetV2 its logits overflow), and all retain images and the protocol's Adam stand for 30% of them and
Adam 1e-4 for one epoch.

Values: the task's.

Reads: retain images, forget images.
"""

import jax
import jax.numpy as jnp

from jaxunlearn.methods.rule import Frozen, UnlearningRule, accuracy, descend, init_state, kl_divergence, teach


def rule(context, *, reset_bn: bool = False) -> UnlearningRule:
    def init(params, batch_stats, key):
        random_params, fresh_stats = context.initialise(key)
        incompetent = Frozen(random_params, fresh_stats if reset_bn else batch_stats)
        return init_state(context, params, batch_stats, key, extra=(Frozen(params, batch_stats), incompetent))

    def step(params, state, retain, forget):
        competent, incompetent = state.extra
        logits = [teach(context, competent, retain.images), teach(context, incompetent, forget.images)]
        targets = jax.nn.softmax(jnp.concatenate(logits))
        images = jnp.concatenate([retain.images, forget.images])

        def loss(student):
            logits = student(images)
            return kl_divergence(targets, logits), {"accuracy": accuracy(logits[: len(retain.labels)], retain.labels)}

        return descend(context, params, state, loss)

    return UnlearningRule(init, step)
