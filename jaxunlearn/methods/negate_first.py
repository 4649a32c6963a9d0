"""NoT (Khalil et al. 2025, arXiv:2503.05657): the kernel of the first convolution is multiplied by -1, once; then
CE(retain).

For any forget set.

Differs: the paper's federated rounds of finetuning are the steps of unlearning.

Values: none.

Reads: retain.
"""

from jaxunlearn.methods.retain_finetune import rule as retain_finetune
from jaxunlearn.methods.rule import UnlearningRule


def rule(context) -> UnlearningRule:
    def prepare(params, state, retain_set, forget_set):
        first = next(name for name in context.layers() if "kernel" in params[name])  # a BatchNorm may be before it
        return params | {first: params[first] | {"kernel": -params[first]["kernel"]}}, state

    return retain_finetune(context)._replace(prepare=prepare)
