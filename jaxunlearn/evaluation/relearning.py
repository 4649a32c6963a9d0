"""How fast a model relearns the forgotten class: what is only hidden comes back sooner than what is gone.

Every model first gets a fresh head for the class, the same for all models of a seed: a head that only says no makes no
difference. Then it takes a few steps of the pretraining optimizer, at a tenth of its learning rate, on training images
of the class alone, and is asked for the class's test images after each. That alone proves nothing: also a network that
knows nothing has soon learned to give them all one answer. It is read beside the reference's of the same seed.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images, epoch_order, normalise
from jaxunlearn.devices.sharding import over_seeds, place_seeds, place_shared, seed_shapes, shard_batch
from jaxunlearn.models.network import Network
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, abstract_key, step_keys, stream_key
from jaxunlearn.training.loop import Chunk, Compiled, EpochLoop, Timing
from jaxunlearn.training.pretraining import TrainState, make_optimizer, train_step

STEPS = 10  # by then every model answers the class, and more steps would only blur what the first ones show
RATE = 0.1  # of the pretraining's learning rate
BLOCK = 250  # images that are evaluated at once, at most: between steps there is memory for a batch of training
HEAD, ORDER, STEP = range(3)  # what is drawn for a seed


class Relearning:
    """Relearns one class with models of one network, all seeds together."""

    def __init__(
        self,
        network: Network,
        protocol: Protocol,
        train: Images,
        forget: np.ndarray,
        test: Images,
        mesh: jax.sharding.Mesh,
        timing: Timing,
    ):
        """`forget`, i32[F], are the places of the forgotten class's images among `train`."""
        self._network, self._mesh = network, mesh
        slow = dataclasses.replace(protocol, pretrain_lr=RATE * protocol.pretrain_lr, pretrain_schedule="constant")
        optimizer = make_optimizer(slow, steps_per_epoch=1)
        asked = np.flatnonzero(np.asarray(test.labels) == protocol.forget_class)
        self._forget, self._shared = place_shared((forget.astype(np.int32), (train, _blocks(test.images, asked))), mesh)
        self.steps = STEPS + 1  # each is asked before it moves the model: one program for all, and one move for nothing
        self._plan = [Chunk(0, self.steps, (protocol.batch_size,))]
        self._begin = Compiled(over_seeds(_begin(network, protocol, optimizer, self.steps), mesh), timing)
        self._loop = EpochLoop(_relearn_step(network, protocol, optimizer), mesh, timing)

    def compile(self, num_seeds: int) -> None:
        """Compiles what `curves` runs on so many seeds' models."""
        key = abstract_key()
        own = seed_shapes((*jax.eval_shape(self._network.initialise, key), key), num_seeds, self._mesh)
        carry, seeded = self._begin.compile(own, self._forget)
        self._loop.compile(carry, seeded, self._shared, self._plan)

    def curves(
        self, params: Any, batch_stats: Any, keys: jax.Array, report: Report = lambda done, metrics: None
    ) -> np.ndarray:
        """Accuracy on the class's test images after 0 to `STEPS` steps, f32[S, STEPS + 1].

        The models, the seed axis in front, are left as they are. One whose logits are not finite answers nothing right.
        """
        carry, seeded = self._begin((params, batch_stats, place_seeds(keys, self._mesh)), self._forget)
        _, metrics = self._loop.run(carry, seeded, self._shared, 0, self._plan, report)
        return metrics["accuracy"].astype(np.float32)


def _blocks(images: jax.Array, asked: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """The images at `asked`, u8[blocks, B, 32, 32, C], and which of them count, bool[blocks, B]: the others fill up."""
    blocks = math.ceil(len(asked) / BLOCK)
    size = math.ceil(len(asked) / blocks)
    counts = np.arange(blocks * size) < len(asked)
    return images[np.resize(asked, (blocks, size))], counts.reshape(blocks, size)


def _begin(network: Network, protocol: Protocol, optimizer: optax.GradientTransformation, steps: int) -> Any:
    head, size = network.layers()[-1], protocol.batch_size

    def begin(own: tuple[Any, Any, jax.Array], forget: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        """The model with a fresh head for the class, and what its steps draw: keys, and the places of their images."""
        params, batch_stats, key = own
        fresh, _ = network.initialise(stream_key(key, Stream.RELEARN, HEAD))
        layer = {
            name: value.at[..., protocol.forget_class].set(fresh[head][name][..., protocol.forget_class])
            for name, value in params[head].items()
        }
        params = params | {head: layer}
        passes = math.ceil(steps * size / len(forget))
        order = epoch_order(stream_key(key, Stream.RELEARN, ORDER), forget, passes).ravel()
        keys = step_keys(key, Stream.RELEARN, jnp.int32(STEP), steps, uses=2)
        # Copies, because the loop donates.
        return jax.tree.map(jnp.copy, TrainState(params, batch_stats, optimizer.init(params))), (keys, order)

    return begin


def _relearn_step(network: Network, protocol: Protocol, optimizer: optax.GradientTransformation) -> Any:
    train = train_step(network, optimizer, protocol)

    def step(
        state: TrainState,
        seeded: tuple[jax.Array, jax.Array],
        shared: tuple[Images, tuple[jax.Array, jax.Array]],
        epoch: jax.Array,
        index: jax.Array,
        sizes: tuple[int],
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def right(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            pixels, counts = block
            logits = network.apply_eval(state.params, state.batch_stats, shard_batch(normalise(pixels, protocol)))
            own = logits[:, protocol.forget_class]
            is_right = (logits.argmax(-1) == protocol.forget_class) & jnp.isfinite(own)
            return (is_right & counts).sum()

        data, blocks = shared
        accuracy = jax.lax.map(right, blocks).sum() / blocks[1].sum()
        return train(state, seeded, data, epoch, index, sizes)[0], {"accuracy": accuracy}

    return step
