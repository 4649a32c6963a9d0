"""Evaluation on the device: what a model says of the test images and of the forgotten class's training images."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images, augment, normalise
from jaxunlearn.devices.sharding import place_seeds, place_shared, seed_shapes, shard_batch
from jaxunlearn.evaluation.metrics import diverged_metrics, unlearning_metrics
from jaxunlearn.models.network import Network
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, stream_key
from jaxunlearn.training.loop import Chunk, EpochLoop, Timing

BATCH_SIZE = 500  # images; BatchNorm is frozen, so it changes only speed and what `mia_augment` draws


class Predictions(NamedTuple):
    """One row a seed, one column an image: the test images, then the members (the forget class's training images)."""

    confidence: np.ndarray  # f32[S, N], maximum softmax probability
    correct: np.ndarray  # bool[S, N], top-1 over all classes
    finite: np.ndarray  # bool[S, N], whether every logit is finite


class Evaluator:
    """Evaluates models of one network on one data set, all seeds together."""

    def __init__(
        self,
        network: Network,
        protocol: Protocol,
        test: Images,
        members: Images,
        mesh: jax.sharding.Mesh,
        timing: Timing,
    ):
        self._forget_class, self._mesh = protocol.forget_class, mesh
        self._test_labels = np.asarray(test.labels)
        self.counts = (len(members.labels), int((self._test_labels == protocol.forget_class).sum()))
        self._total = len(test.labels) + len(members.labels)
        # One array of whole batches, so one program serves all; the images repeated to fill the last are cut off.
        fill = -self._total % BATCH_SIZE
        indices = np.arange(self._total + fill) % self._total
        self._images = place_shared(
            Images(*(jnp.concatenate(parts)[indices] for parts in zip(test, members, strict=True))), mesh
        )
        self.steps = len(indices) // BATCH_SIZE
        self._plan = [Chunk(0, self.steps, (BATCH_SIZE,))]
        self._loop = EpochLoop(_predict_step(network, protocol, len(test.labels)), mesh, timing)

    def compile(self, variables: Any, num_seeds: int) -> None:
        """Compiles what `predict` runs on so many seeds' models, of which one has (params, batch_stats) like these."""
        key = jax.eval_shape(jax.random.key, 0)
        self._loop.compile((), seed_shapes((*variables, key), num_seeds, self._mesh), self._images, self._plan)

    def predict(
        self, params: Any, batch_stats: Any, keys: jax.Array, report: Report = lambda done, metrics: None
    ) -> Predictions:
        """Predictions of models with the seed axis in front."""
        seeded = (params, batch_stats, place_seeds(keys, self._mesh))
        _, outputs = self._loop.run((), seeded, self._images, 0, self._plan, report)
        flat = {name: value.reshape(len(value), -1)[:, : self._total] for name, value in outputs.items()}
        return Predictions(**flat)

    def metrics(
        self, params: Any, batch_stats: Any, keys: jax.Array, report: Report = lambda done, metrics: None
    ) -> list[dict[str, Any]]:
        """The metrics of each seed's model; all None where a logit is not finite."""
        predictions = self.predict(params, batch_stats, keys, report)
        tests = len(self._test_labels)
        forget = np.flatnonzero(self._test_labels == self._forget_class)
        results: list[dict[str, Any]] = []
        for confidence, correct, finite in zip(*predictions, strict=True):
            if not finite.all():
                results.append(diverged_metrics())
                continue
            results.append(
                unlearning_metrics(
                    correct[:tests], self._test_labels, self._forget_class, confidence[tests:], confidence[forget]
                )
            )
        return results


def _predict_step(network: Network, protocol: Protocol, tests: int) -> Any:
    def step(
        carry: tuple[()],
        seeded: tuple[Any, Any, jax.Array],
        data: Images,
        epoch: jax.Array,
        index: jax.Array,
        sizes: tuple[int],
    ) -> tuple[tuple[()], dict[str, jax.Array]]:
        params, batch_stats, key = seeded
        (size,) = sizes
        pixels, labels = (jax.lax.dynamic_slice_in_dim(part, index * size, size) for part in data)
        if protocol.mia_augment:
            is_member = (index * size + jnp.arange(size) >= tests)[:, None, None, None]
            attacked = augment(pixels, jnp.arange(size), stream_key(key, Stream.ATTACK, index), protocol)
            pixels = jnp.where(is_member, attacked, pixels)
        logits = network.apply_eval(params, batch_stats, shard_batch(normalise(pixels, protocol)))
        return carry, {
            "confidence": jax.nn.softmax(logits).max(-1),
            "correct": logits.argmax(-1) == labels,
            "finite": jnp.isfinite(logits).all(-1),
        }

    return step
