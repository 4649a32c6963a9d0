"""What models are worth: asked on the device all seeds together, judged on the host one by one."""

from collections.abc import Iterable, Sequence
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

ON_THE_WAY = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score", "symmetric_score")


class Asked(NamedTuple):
    """Models, what each says, and what that shows by itself; several draws of all seeds in a row."""

    models: Models
    predictions: list[Predictions]
    results: list[dict[str, Any]]  # metrics and `companions`, compared with nothing


class Scorer:
    """Scores the models of a run: first the pretrained ones, then, where there are any, retrained ones, then others."""

    def __init__(self, run: Prepared):
        protocol = run.request.protocol
        self._run, self._class, self._count = run, protocol.forget_class, len(run.keys)
        self._companions = Companions(run.evaluator.labels, protocol.forget_class, protocol.mia_augment)
        self._pretrained: list[Predictions] = []
        self._retrained: Asked | None = None

    def start_from(self, models: Models) -> Asked:
        """Asks the models as those before unlearning."""
        asked = self.ask(models)
        self._pretrained = asked.predictions
        return asked

    def compare_with(self, models: Models) -> Asked:
        """Asks the models as those that never saw the class."""
        asked = self.ask(models)
        self._retrained = asked._replace(models=models._replace(params=None, batch_stats=None))  # done with
        return asked

    def ask(self, models: Models) -> Asked:
        """Asks the models of one or more draws of all seeds."""
        run = self._run
        predictions: list[Predictions] = []
        results: list[dict[str, Any]] = []
        images = run.evaluator.steps * BATCH_SIZE * self._count
        for first in range(0, len(models.outcomes), self._count):
            params, batch_stats = (
                place_seeds(jax.tree.map(lambda x, i=first: x[i : i + self._count], tree), run.mesh)
                for tree in (models.params, models.batch_stats)
            )
            with run.timing("evaluate_s"), run.reporter.task("evaluate", 1, run.evaluator.steps, images) as report:
                said = run.evaluator.predict(params, batch_stats, run.keys, _silent(report(0)))
            with run.timing("companions_s"):
                curves = self._relearn(params, batch_stats)
                before = self._pretrained or said
                results += [self._alone(*one) for one in zip(said, before, curves, strict=True)]
            predictions += [own._replace(features=None) for own in said]  # large, and not needed any more
        return Asked(models, predictions, results)

    def on_the_way(self, places: Sequence[int], state: Any) -> list[dict[str, float | None]]:
        """The metrics `ON_THE_WAY` of models that are being trained: of draws of all seeds in a row those at `places`.

        Runs what `ask` does: where not all seeds of a draw are there, one of them stands in for the others.
        """
        run, found = self._run, dict[int, dict[str, Any]]()
        with run.timing("evaluate_s"), jax.set_mesh(run.mesh):
            for draw in dict.fromkeys(place // self._count for place in places):
                rows = {place % self._count: row for row, place in enumerate(places) if place // self._count == draw}
                chosen = np.array([rows.get(seed, min(rows.values())) for seed in range(self._count)])
                models = jax.tree.map(lambda x, rows=chosen: x[rows], (state.params, state.batch_stats))
                params, batch_stats = place_seeds(models, run.mesh)
                said = run.evaluator.predict(params, batch_stats, run.keys)
                found |= {row: self._companions.metrics(said[seed]) for seed, row in rows.items()}
        return [{name: found[row][name] for name in ON_THE_WAY} for row in range(len(places))]

    def reference(self, index: int, method: str = "") -> tuple[int, dict[str, Any]] | None:
        """Which retrained model the one at `index` is compared with, by its place, and its result; None: with none.

        Its own seed's, or, where it is retrained itself, the next seed's. What has diverged or learned nothing is none.
        """
        seed, retrained = index % self._count, self._retrained
        other = (seed + 1) % self._count if method == RETRAIN else seed
        if retrained is None or (method == RETRAIN and other == seed):
            return None
        result = retrained.results[other]
        if not retrained.models.outcomes[other].sound or result["companions"] is None:
            return None
        return other, result

    def worth(self, asked: Asked, index: int, method: str = "") -> dict[str, Any]:
        """The metrics of the model at `index` and, under `companions`, what stands beside them."""
        own, reference = asked.results[index], self.reference(index, method)
        if own["companions"] is None or reference is None or self._retrained is None:
            return own
        other, there = reference
        with self._run.timing("companions_s"):
            both = (asked.predictions[index], self._retrained.predictions[other])
            distance = self._companions.against_retrain(*both, own["forget_mia_auc"], there["forget_mia_auc"])
            beside = own["companions"] | {"against_retrain": {"seed": self._run.request.seeds[other], **distance}}
            if beside["full"] is not None:
                beside |= {"full": compared(beside["full"], there["companions"]["full"])}
        return own | {"companions": beside}

    def _relearn(self, params: Any, batch_stats: Any) -> Iterable[list[float]]:
        """Each seed's curve; an empty one where nobody asked for it."""
        run = self._run
        if run.relearning is None:
            return [[] for _ in range(self._count)]
        steps, batch = run.relearning.steps, run.request.protocol.batch_size * self._count
        with run.reporter.task("relearn", 1, steps, steps * batch) as report:
            curves: list[list[float]] = run.relearning.curves(params, batch_stats, run.keys, report(0)).tolist()
        return curves

    def _alone(self, own: Predictions, before: Predictions, curve: list[float]) -> dict[str, Any]:
        metrics = self._companions.metrics(own)
        if metrics["retain_acc"] is None:
            return metrics | {"companions": None}
        beside = self._companions.alone(own, before if before.finite(self._class) else None)
        full = self._companions.full(own, curve) if curve else None
        return metrics | {"companions": beside | {"against_retrain": None, "full": full}}


def _silent(report: Report) -> Report:
    """Reports how far it is, without the logits."""
    return lambda done, metrics: report(done, {})
