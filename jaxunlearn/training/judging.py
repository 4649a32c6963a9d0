"""Whether a model learns anything from its images at all.

Some starts do not. VGG-16-BN with the published learning rate of 0.1 and no warm-up can lose all units of a hidden
layer to ReLU in its first epochs: from then on its answer is the same for all images, and the
other weights decay to nothing.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxunlearn.training.checkpoints import Saved
from jaxunlearn.training.history import Sums

EPOCHS, STEPS = 2, 500  # that are done at least before anything is said


class Judge(NamedTuple):
    """What a model that has learned nothing shows in an epoch of training."""

    epoch: int  # the one that is looked at, from 1
    steps: int  # of an epoch
    accuracy: float  # no more than this
    loss: float  # no less than this

    def untrained(self, saved: Saved | None) -> bool:
        """Whether a model is past that epoch and has learned nothing."""
        return saved is not None and saved.position.epoch >= self.epoch and self.shows(saved.history.sums)

    def shows(self, sums: Sums) -> bool:
        """Whether these sums over the steps of each epoch are those of a model that has learned nothing."""
        accuracy, loss = (sums.get(name, [])[self.epoch - 1 : self.epoch] for name in ("accuracy", "loss"))
        if not (accuracy and loss) or accuracy[0] is None or loss[0] is None:
            return False
        return accuracy[0] <= self.accuracy * self.steps and loss[0] >= self.loss * self.steps


def judge_of(labels: np.ndarray, steps: int, epochs: int) -> Judge | None:
    """The judge of so many epochs of `steps` on images with these labels, i32[N]; None where they are too few,
    or all images of one class.

    The best that one answer for all images can do is the commonest label's share right, and a loss of the labels'
    entropy (nats). Nothing is learned within three standard errors of the first and half a percent of the other.
    """
    epoch = max(EPOCHS, math.ceil(STEPS / steps))
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    if epoch > epochs or len(shares) == 1:
        return None
    chance, entropy = float(shares.max()), float(-(shares * np.log(shares)).sum())
    return Judge(epoch, steps, chance + 3 * math.sqrt(chance * (1 - chance) / len(labels)), 0.995 * entropy)
