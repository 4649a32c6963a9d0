"""Evaluation on the device: what models say of the test images and of training images, all seeds together."""

import io
import itertools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images, augment, normalise
from jaxunlearn.devices.sharding import fetch, place_seeds, place_shared, seed_shapes, shard_batch
from jaxunlearn.evaluation.distances import log_probabilities
from jaxunlearn.models.network import Network
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, abstract_key, stream_key
from jaxunlearn.training.loop import Chunk, EpochLoop, Timing
from jaxunlearn.training.unlearning import Split

BATCH_SIZE = 500  # images; BatchNorm is frozen, so it changes only speed and what the attack's augmentation draws

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # of a file that `packed` has not made


class Sets(NamedTuple):
    """One value for each set of images that a model is asked about."""

    test: Any
    forget_train: Any  # the training images of the class to forget: the attack's members
    augmented: Any  # the same, cropped and flipped as in training, once each
    retain_train: Any  # as many of the other training images as there are test images, the first of the file


class Predictions(NamedTuple):
    """What one model says: of each set, of N images, logits f32[N, classes] and perhaps features f32[N, width]."""

    logits: Sets
    features: Sets | None

    def finite(self, forget_class: int) -> bool:
        """Whether every logit is finite, or minus infinity for the class to forget: an answer that is ruled out."""
        ruled_out = np.arange(self.logits.test.shape[1]) == forget_class
        return all((np.isfinite(x) | (np.isneginf(x) & ruled_out)).all() for x in self.logits)


def packed(predictions: Predictions | None, labels: Sets, **about: str) -> bytes:
    """Predictions as an .npz: of each set log-probabilities f16[N, classes], and `<set>_labels` i32[N].

    `about` are texts to keep beside them. Without predictions, of a model that has failed, nothing else but the labels.
    """
    arrays: dict[str, Any] = {}
    for name, logits in predictions.logits._asdict().items() if predictions else ():
        log_p = log_probabilities(logits)
        # Below the least finite float16 a probability is nothing; minus infinity stays.
        arrays[name] = np.where(np.isneginf(log_p), log_p, np.maximum(log_p, -65504)).astype(np.float16)
    beside = {f"{name}_labels": x for name, x in labels._asdict().items()} | about
    content = io.BytesIO()
    np.savez_compressed(content, **arrays, **beside)
    return content.getvalue()


def has_predictions(file: Path, digest: str) -> bool:
    """Whether a file of `packed`, beside which this digest was kept, says more than that the model failed."""
    try:
        with np.load(file) as said:
            return str(said["digest"]) == digest and Sets._fields[0] in said
    except UNREADABLE:
        return False


class Evaluator:
    """Asks models of one network about one data set; with `features`, also for what the last layer is given."""

    def __init__(
        self,
        network: Network,
        protocol: Protocol,
        train: Images,
        split: Split,
        test: Images,
        mesh: jax.sharding.Mesh,
        timing: Timing,
        features: bool = False,
    ):
        self._mesh, self._features = mesh, features
        retain = np.asarray(split.retain)[: len(test.labels)]
        members, others = (Images(*(part[chosen] for part in train)) for chosen in (split.forget, retain))
        sets = Sets(test, members, members, others)
        self.labels = Sets(*(np.asarray(fetch(images.labels)) for images in sets))
        self.counts = (len(self.labels.forget_train), int((self.labels.test == protocol.forget_class).sum()))
        ends = np.cumsum([len(labels) for labels in self.labels]).tolist()
        self._slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        # One array of whole batches, so one program serves all; the images repeated to fill the last are cut off.
        indices = np.arange(ends[-1] + -ends[-1] % BATCH_SIZE) % ends[-1]
        self._images = place_shared(jnp.concatenate([images.images for images in sets])[indices], mesh)
        self.steps = len(indices) // BATCH_SIZE
        self._plan = [Chunk(0, self.steps, (BATCH_SIZE,))]
        augmented = self._slices[Sets._fields.index("augmented")]
        self._loop = EpochLoop(_predict_step(network, protocol, augmented, features), mesh, timing)

    def compile(self, variables: Any, num_seeds: int) -> None:
        """Compiles what `predict` runs on so many seeds' models, of which one has (params, batch_stats) like these."""
        key = abstract_key()
        self._loop.compile((), seed_shapes((*variables, key), num_seeds, self._mesh), self._images, self._plan)

    def predict(
        self, params: Any, batch_stats: Any, keys: jax.Array, report: Report = lambda done, metrics: None
    ) -> list[Predictions]:
        """What each seed's model says; the models have the seed axis in front. A key draws the augmentation."""
        seeded = (params, batch_stats, place_seeds(keys, self._mesh))
        _, outputs = self._loop.run((), seeded, self._images, 0, self._plan, report)
        flat = {name: value.reshape(len(value), -1, value.shape[-1]) for name, value in outputs.items()}
        logits, features = (
            [Sets(*(values[part] for part in self._slices)) for values in flat.get(name, ())]
            for name in ("logits", "features")
        )
        return list(itertools.starmap(Predictions, itertools.zip_longest(logits, features)))


def _predict_step(network: Network, protocol: Protocol, augmented: slice, features: bool) -> Any:
    def step(
        carry: tuple[()],
        seeded: tuple[Any, Any, jax.Array],
        data: jax.Array,
        epoch: jax.Array,
        index: jax.Array,
        sizes: tuple[int],
    ) -> tuple[tuple[()], dict[str, jax.Array]]:
        params, batch_stats, key = seeded
        (size,) = sizes
        pixels = jax.lax.dynamic_slice_in_dim(data, index * size, size)
        place = (index * size + jnp.arange(size))[:, None, None, None]
        drawn = augment(pixels, jnp.arange(size), stream_key(key, Stream.ATTACK, index), protocol)
        pixels = jnp.where((place >= augmented.start) & (place < augmented.stop), drawn, pixels)
        images = shard_batch(normalise(pixels, protocol))
        if not features:
            return carry, {"logits": network.apply_eval(params, batch_stats, images)}
        said = network.forward(params, batch_stats, images, key, train=False, batch_norm=False)
        return carry, {"logits": said.logits, "features": said.features}

    return step
