"""What is known of one model's training: how far it is, what happened on the way, what came of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Sums = dict[str, list[float | None]]  # of a metric over the steps of each epoch, the last perhaps not whole
Curves = dict[str, list[float | None]]  # of a metric, its mean over the steps of each whole epoch; None: not known
Evaluated = dict[str, list[Any]]  # "epoch", and what a model was worth after each of these; empty: nobody asked


class Position(NamedTuple):
    """How far training is: whole epochs, then steps of the epoch after them. Passes before the first epoch have
    numbers below 0, the last of them -1."""

    epoch: int
    step: int

    @property
    def name(self) -> str:
        """The name of a checkpoint's folder."""
        return f"epoch{self.epoch:04d}" + (f"-step{self.step:06d}" if self.step else "")


class History(NamedTuple):
    """What is known of a model on its way; written beside its state under these names."""

    seconds: float = 0.0  # that training up to here took: its share of the time of the seeds trained together
    prepared: float = 0.0  # of the seconds, those before the first epoch
    diverged: int | None = None  # the first step whose loss, or after which a weight, was not finite
    sums: Sums = {}  # noqa: RUF012 -- read only, as the others; of the metrics; None where not known or not finite
    evaluated: Evaluated = {}  # noqa: RUF012
    devices: Sequence[str] = ()  # the kinds that it was trained on; empty: not known


class Outcome(NamedTuple):
    """What came of training a model: what its history has under the same names, and more. The defaults are those of a
    model that was given."""

    seconds: float = 0.0
    prepared: float = 0.0
    diverged: int | None = None
    evaluated: Evaluated = {}  # noqa: RUF012
    devices: Sequence[str] = ()
    curves: Curves = {}  # noqa: RUF012 -- empty where no metric is known
    untrained: bool = False  # whether it had learned nothing when that was looked at, which ended its training
    attempts: int = 0  # at training it; 0 where it was given

    @property
    def sound(self) -> bool:
        """Whether there is a model that anything can be said of."""
        return self.diverged is None and not self.untrained
