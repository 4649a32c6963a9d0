"""What models are worth: asked on the device all seeds together, judged on the host one by one."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.devices.sharding import place_seeds
from jaxunlearn.evaluation.companions import Companions, compared
from jaxunlearn.evaluation.predictions import BATCH_SIZE, Predictions
from jaxunlearn.progress import Report
from jaxunlearn.registry import RETRAIN
from jaxunlearn.runs.preparation import Prepared
from jaxunlearn.training.pretrained import Models


class Asked(NamedTuple):
    """Models, and what each says and how fast it learns the class again; several draws of all seeds in a row."""

    models: Models
    predictions: list[Predictions]
    relearning: list[np.ndarray]  # empty where nobody asked


class Reference(NamedTuple):
    """A retrained model."""

    seed: int
    predictions: Predictions
    worth: dict[str, Any]  # its metrics and companions, itself compared with nothing


class Scorer:
    """Scores the models of a run: first the pretrained ones, then, where there are any, retrained ones, then others."""

    def __init__(self, run: Prepared):
        protocol = run.request.protocol
        self._run, self._class, self._count = run, protocol.forget_class, len(run.keys)
        self._companions = Companions(run.evaluator.labels, protocol.forget_class, protocol.mia_augment)
        self._pretrained: list[Predictions] = []
        self._references: dict[int, Reference] = {}  # by the seed's place

    def ask(self, models: Models) -> Asked:
        """Asks the models of one or more draws of all seeds."""
        run = self._run
        predictions: list[Predictions] = []
        relearning: list[np.ndarray] = []
        images = run.evaluator.steps * BATCH_SIZE * self._count
        for first in range(0, len(models.seconds), self._count):
            params, batch_stats = (
                place_seeds(jax.tree.map(lambda x, i=first: x[i : i + self._count], tree), run.mesh)
                for tree in (models.params, models.batch_stats)
            )
            with run.timing("evaluate_s"), run.reporter.task("evaluate", 1, run.evaluator.steps, images) as report:
                predictions += run.evaluator.predict(params, batch_stats, run.keys, _silent(report(0)))
            if run.relearning is not None:
                steps, batch = run.relearning.steps, run.request.protocol.batch_size * self._count
                with run.timing("companions_s"), run.reporter.task("relearn", 1, steps, steps * batch) as report:
                    relearning += list(run.relearning.curves(params, batch_stats, run.keys, report(0)))
        return Asked(models, predictions, relearning)

    def start_from(self, models: Models) -> Asked:
        """Asks the models as those before unlearning."""
        asked = self.ask(models)
        self._pretrained = [own._replace(features=None) for own in asked.predictions]  # they would stay to the end
        return asked

    def compare_with(self, models: Models) -> Asked:
        """Asks the models as those that never saw the class. What has diverged or learned nothing is no reference."""
        asked = self.ask(models)
        for i, own in enumerate(asked.predictions):
            if models.diverged[i] is None and not models.untrained[i] and own.finite(self._class):
                seed, said = self._run.request.seeds[i], own._replace(features=None)
                self._references[i] = Reference(seed, said, self._alone(asked, i))
        return asked

    def reference(self, index: int, method: str = "") -> Reference | None:
        """The retrained model that the one at `index` is compared with; None where there is none.

        Its own seed's; that of another seed where it is retrained itself.
        """
        seed = index % self._count
        if method == RETRAIN:
            return self._references.get((seed + 1) % self._count) if self._count > 1 else None
        return self._references.get(seed)

    def metrics(self, asked: Asked, index: int) -> dict[str, Any]:
        """The metrics of the model at `index` alone."""
        return self._companions.metrics(asked.predictions[index])

    def worth(self, asked: Asked, index: int, method: str = "") -> dict[str, Any]:
        """The metrics of the model at `index` and, under `companions`, what stands beside them."""
        own, known = asked.predictions[index], self._references.get(index) if method == RETRAIN else None
        result = known.worth if known else self._alone(asked, index)
        beside, reference = result["companions"], self.reference(index, method)
        if beside is None or reference is None:
            return result
        with self._run.timing("companions_s"):
            distance = self._companions.against_retrain(own, reference.predictions)
            beside = beside | {"against_retrain": {"seed": reference.seed, **distance}}
            if asked.relearning:
                beside |= {"full": compared(beside["full"], reference.worth["companions"]["full"])}
        return result | {"companions": beside}

    def _alone(self, asked: Asked, index: int) -> dict[str, Any]:
        own, before = asked.predictions[index], self._pretrained[index % self._count]
        metrics = self._companions.metrics(own)
        if metrics["retain_acc"] is None:
            return metrics | {"companions": None}
        with self._run.timing("companions_s"):
            beside = self._companions.alone(own, before if before.finite(self._class) else None)
            full = self._companions.full(own, asked.relearning[index].tolist()) if asked.relearning else None
        return metrics | {"companions": beside | {"against_retrain": None, "full": full}}


def _silent(report: Report) -> Report:
    """Reports how far it is, without the logits."""
    return lambda done, metrics: report(done, {})
