"""Towards the uniform answer on forget, harder where the model is still sure. Submitted to the task by claude-opus-4.6.

CE(retain) + .2 mean_i w_i KL(U || p(x_i)) + .03 mean z(x)^2 on forget, w_i = 1 + 2 p_y(x_i) without a gradient, so at
least 1; the last mean is over images and classes. The gradient is clipped to global norm 5. BatchNorm is in eval mode
throughout: its running statistics are used and never move, its scale and bias learn.

For classes and samples.

Differs: nothing.

Values: the submission's.

Reads: retain, forget.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn.ingredients.checks import check_positive
from jaxunlearn.ingredients.gradients import clip
from jaxunlearn.methods.rule import UnlearningRule, accuracy, cross_entropy, differentiate, init_state, update


def rule(
    context,
    *,
    uniform_weight: float = 0.2,
    confidence_weight: float = 2.0,
    logit_weight: float = 0.03,
    max_norm: float = 5.0,
) -> UnlearningRule:
    check_positive(max_norm=max_norm)

    def step(params, state, retain, forget):
        images = jnp.concatenate([retain.images, forget.images])  # no image sees another: one forward does

        def loss(student):
            logits = context.forward(student.params, state.batch_stats, images, state.key, True, False).logits
            kept, logits = jnp.split(logits, [len(retain.labels)])
            log_p = jax.nn.log_softmax(logits)
            sure = jnp.take_along_axis(jnp.exp(log_p), forget.labels[:, None], 1)[:, 0]
            weights = jax.lax.stop_gradient(1 + confidence_weight * sure)
            from_uniform = -jnp.log(context.num_classes) - log_p.mean(-1)
            loss = cross_entropy(kept, retain.labels) + uniform_weight * (weights * from_uniform).mean()
            return loss + logit_weight * (logits**2).mean(), {"accuracy": accuracy(kept, retain.labels)}

        gradients, state, metrics = differentiate(context, params, state, loss)
        return *update(context, params, state, clip(gradients, max_norm)), metrics

    return UnlearningRule(partial(init_state, context), step)
