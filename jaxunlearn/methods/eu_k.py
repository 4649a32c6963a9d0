"""Exact unlearning of the last k layers (Goel et al. 2022, arXiv:2201.06640, EU-k): the last k layers are initialised
afresh, BatchNorm statistics too, and then learn as in CF-k: CE(retain), all other layers frozen.

For any forget set. Which layers the last k are: see `cf_k`.

Differs: the fresh layers have the steps of unlearning alone, with the protocol's Adam, where the paper gives them the
schedule of training; frozen layers keep their running statistics, which published code lets move; and k is one for all.

Values: ours.

Reads: retain.
"""

from jaxunlearn.ingredients.masks import last_layers
from jaxunlearn.methods.cf_k import rule as cf_k
from jaxunlearn.methods.rule import UnlearningRule


def rule(context, *, k: int = 8) -> UnlearningRule:
    names = context.layers()

    def prepare(params, state, retain_set, forget_set):
        fresh_params, fresh_stats = context.initialise(state.key)
        learning = last_layers(names, params, k)

        def renewed(old, fresh):
            return {name: (fresh if name in learning else old)[name] for name in old}

        return renewed(params, fresh_params), state._replace(batch_stats=renewed(state.batch_stats, fresh_stats))

    return cf_k(context, k=k)._replace(prepare=prepare)
