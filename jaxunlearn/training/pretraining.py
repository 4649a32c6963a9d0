"""Pretraining: SGD on cross-entropy, cosine learning rate stepped once an epoch (constants: `benchmarks.Protocol`).

`retrain`, the reference that never saw the forgotten class, is the same on the retain images alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images, augmented_batch, epoch_order
from jaxunlearn.devices.sharding import over_seeds, place_seeds, place_shared, shard_batch
from jaxunlearn.methods.rule import accuracy, cross_entropy
from jaxunlearn.models.network import Network
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, abstract_key, step_keys, stream_key
from jaxunlearn.training.history import Position
from jaxunlearn.training.loop import Compiled, EpochLoop, Keeper, Timing, batch_sizes, chunks


class TrainState(NamedTuple):
    """What pretraining changes. A checkpoint holds one seed's."""

    params: Any
    batch_stats: Any
    opt_state: Any


def make_optimizer(protocol: Protocol, steps_per_epoch: int) -> optax.GradientTransformation:
    """PyTorch's SGD(lr, momentum, weight_decay, nesterov): decay joins the gradient before the momentum.

    The cosine schedule is lr(epoch) = lr (1 + cos(pi epoch / epochs)) / 2, constant within an epoch.
    """

    def cosine(count: jax.Array) -> jax.Array:
        epoch = count // steps_per_epoch
        return protocol.pretrain_lr * (1 + jnp.cos(jnp.pi * epoch / protocol.pretrain_epochs)) / 2

    schedule = cosine if protocol.pretrain_schedule == "cosine" else protocol.pretrain_lr
    return optax.chain(
        optax.add_decayed_weights(protocol.pretrain_weight_decay),
        optax.sgd(schedule, momentum=protocol.pretrain_momentum, nesterov=protocol.pretrain_nesterov),
    )


class Pretraining:
    """The pretraining of a group of seeds on `indices` of the training images, epoch by epoch."""

    def __init__(
        self,
        network: Network,
        protocol: Protocol,
        data: Images,
        indices: np.ndarray,
        mesh: jax.sharding.Mesh,
        timing: Timing,
    ):
        sizes = batch_sizes(len(indices), protocol.batch_size, protocol.drop_last, "training")
        optimizer = make_optimizer(protocol, len(sizes))
        self.mesh, self.passes, self.epochs = mesh, 0, protocol.pretrain_epochs
        self.steps_per_epoch, self.images_per_epoch = len(sizes), sum(sizes)
        self._plan = chunks([(size,) for size in sizes])
        self._data, self.timing = place_shared(data, mesh), timing
        self._indices = place_shared(indices.astype(np.int32), mesh)
        self._loop = EpochLoop(train_step(network, optimizer, protocol), mesh, timing)

        def start(key: jax.Array, shared: None) -> TrainState:
            params, batch_stats = network.initialise(stream_key(key, Stream.INIT))
            return TrainState(params, batch_stats, optimizer.init(params))

        def draw(key: jax.Array, shared: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            indices, epoch = shared
            keys = step_keys(key, Stream.PRETRAIN, epoch, self.steps_per_epoch, uses=2)
            return keys, epoch_order(stream_key(key, Stream.PRETRAIN_ORDER, epoch), indices)[0]

        self._start_one = start
        self._start = jax.jit(over_seeds(start, mesh))
        self._draw = Compiled(over_seeds(draw, mesh), timing)

    def start(self, keys: jax.Array) -> TrainState:
        """Fresh states for keys[S], the seed axis in front."""
        with self.timing("compile_s"):  # small programs: what they take is their compilation
            return jax.block_until_ready(self._start(place_seeds(keys, self.mesh), None))

    def abstract(self, position: Position) -> TrainState:
        """Shapes and dtypes of one seed's state, the same everywhere."""
        return jax.eval_shape(self._start_one, abstract_key(), None)

    def epoch(
        self,
        state: TrainState,
        keys: jax.Array,
        epoch: int,
        report: Report = lambda done, metrics: None,
        first: int = 0,
        keeper: Keeper | None = None,
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """One epoch of all seeds from step `first` on; `state` is donated.

        Returns (state, metrics f32[S, steps from `first` on]: loss, accuracy).
        """
        keys = place_seeds(keys, self.mesh)
        drawn = self._draw(keys, (self._indices, place_shared(np.int32(epoch), self.mesh)))
        return self._loop.run(state, drawn, self._data, epoch, self._plan, report, first, keeper)


def train_step(network: Network, optimizer: optax.GradientTransformation, protocol: Protocol) -> Callable[..., Any]:
    """A `loop.Step` on a TrainState; seeded: (keys[steps, 2], the places of the images in their order, i32[N])."""

    def step(
        state: TrainState,
        seeded: tuple[jax.Array, jax.Array],
        data: Images,
        epoch: jax.Array,
        index: jax.Array,
        sizes: tuple[int],
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        keys, order = seeded
        augment_key, dropout_key = keys[index]
        chosen = jax.lax.dynamic_slice(order, (index * protocol.batch_size,), sizes)
        batch = shard_batch(augmented_batch(data, chosen, augment_key, protocol))

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, batch_stats = network.apply_train(params, state.batch_stats, batch.images, dropout_key)
            return cross_entropy(logits, batch.labels), (logits, batch_stats)

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "accuracy": accuracy(logits, batch.labels)}
        return TrainState(params, batch_stats, opt_state), metrics

    return step
