"""What a reader must know of a result before its scores: marks that a record and the table carry."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.evaluation.metrics import auc_standard_error

COLLAPSE = 0.1  # of the accuracy on the retained classes
INVERTED = 2.0  # standard errors
MASK = 0.01  # nats, of at most ln 2

FLAGS = ("collapsed", "inverted_membership", "above_retrain", "output_mask")
Flags = dict[str, bool | None]  # by `FLAGS`


def flags(
    before: Mapping[str, Any], after: Mapping[str, Any], retrained: Mapping[str, Any] | None, members: int, others: int
) -> Flags:
    """The marks of one model; None where it cannot be told.

    collapsed: unlearning cost more than `COLLAPSE` of the accuracy on the retained classes.
    inverted_membership: the attack is wrong so often that this tells members apart: its area on clean members is more
      than `INVERTED` standard errors below one half, and below that of a retrained model.
    above_retrain: the score is above that of a retrained model, which never saw the class.
    output_mask: the model's answers to the forgotten images are the pretrained model's without the class, to within
      `MASK` of Jensen-Shannon divergence: nothing is shown to be erased.

    Args:
      before, after: metrics and `companions` of the pretrained and of the unlearned model.
      retrained: the same of a retrained model of the same seed, if one is at hand.
      members, others: how many images of the forgotten class the attack tells apart, trained on and not.
    """
    if after["retain_acc"] is None:
        return dict.fromkeys(FLAGS)
    area, low = after["forget_mia_auc"], 0.5 - INVERTED * auc_standard_error(members, others)
    collapsed = inverted = above = None
    if before["retain_acc"] is not None:
        collapsed = before["retain_acc"] - after["retain_acc"] > COLLAPSE
    if retrained is not None:
        above = after["unlearn_score"] > retrained["unlearn_score"]
        inverted = area < min(low, retrained["forget_mia_auc"])
    elif area >= low:
        inverted = False
    masked = after["companions"]["mask_divergence"]
    return {
        "collapsed": collapsed,
        "inverted_membership": inverted,
        "above_retrain": above,
        "output_mask": None if masked is None else masked < MASK,
    }
