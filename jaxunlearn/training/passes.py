"""A rule's passes: each goes over a set of images before the first step, as an epoch does, and is saved like one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images, clean_batch
from jaxunlearn.devices.sharding import over_seeds, place_shared, shard_batch, whole
from jaxunlearn.methods.rule import Pass, RuleState
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, step_keys
from jaxunlearn.training.loop import Compiled, EpochLoop, Keeper, Timing, batch_sizes, chunks


class Carry(NamedTuple):
    """What unlearning changes, for one seed."""

    params: Any
    batch_stats: Any
    opt_state: Any
    extra: Any
    passing: Any = ()  # what a pass carries, within it
    numbers: Any = ()  # hyperparameters of its own, by name, where those of a group differ

    def state(self, key: jax.Array, step: jax.Array, epoch: jax.Array) -> RuleState:
        """What a rule is given beside the parameters."""
        return RuleState(self.batch_stats, self.opt_state, key, self.extra, step, epoch)


def carried(params: Any, state: RuleState, numbers: Any) -> Carry:
    """What goes on of what a rule has returned."""
    return Carry(params, state.batch_stats, state.opt_state, state.extra, numbers=numbers)


class Passing:
    """A pass, the rule's `number`th from 0, over the images at `indices` for a group of seeds.

    `pass_of` makes it of a seed's own numbers, of () as it is without.
    """

    def __init__(
        self,
        pass_of: Callable[[Any], Pass],
        number: int,
        indices: np.ndarray,
        protocol: Protocol,
        mesh: jax.sharding.Mesh,
        timing: Timing,
    ):
        one = pass_of(())
        count = len(indices) if one.images is None else min(one.images, len(indices))
        size = one.batch_size or protocol.batch_size
        sizes = batch_sizes(count, size, drop_last=False, kind=one.over)
        self._of, self._plan = pass_of, chunks([(size,) for size in sizes])
        self._indices = place_shared(indices.astype(np.int32), mesh)

        def draw(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = step_keys(key, Stream.PASS, jnp.int32(number), len(sizes) + 3, uses=1)[:, 0]
            order = indices if one.images is None else jax.random.permutation(keys[2], indices)[:count]
            return keys, order

        # Copies, because the loop donates: no two arrays may share a buffer.
        def begin(own: tuple[Carry, jax.Array], shared: None) -> Carry:
            carry, keys = own
            return whole(jax.tree.map(jnp.copy, self.begin(carry, keys[0])))

        def step(
            carry: Carry, seeded: Any, data: Images, epoch: jax.Array, index: jax.Array, sizes: tuple[int]
        ) -> tuple[Carry, dict[str, jax.Array]]:
            keys, order = seeded
            chosen = jax.lax.dynamic_slice(order, (index * size,), sizes)
            batch = shard_batch(clean_batch(data, chosen, protocol))
            state = carry.state(keys[index + 3], index, jnp.int32(0))
            passing = pass_of(carry.numbers).step(carry.params, state, carry.passing, batch)
            return carry._replace(passing=whole(passing)), {"batch": index}  # the loop waits for a metric

        def end(own: tuple[Carry, jax.Array], shared: None) -> Carry:
            carry, keys = own
            state = carry.state(keys[1], jnp.int32(len(sizes)), jnp.int32(0))
            after = carried(*pass_of(carry.numbers).finish(carry.params, state, carry.passing), carry.numbers)
            return whole(jax.tree.map(jnp.copy, after))

        self._draw = Compiled(over_seeds(draw, mesh), timing)
        self._begin = Compiled(over_seeds(begin, mesh), timing)
        self._loop = EpochLoop(step, mesh, timing)
        self._end = Compiled(over_seeds(end, mesh), timing)

    def begin(self, carry: Carry, key: jax.Array) -> Carry:
        """One seed's carry before the first batch."""
        state = carry.state(key, jnp.int32(0), jnp.int32(0))
        return carry._replace(passing=self._of(carry.numbers).init(carry.params, state))

    def compile(self, carry: Any, keys: Any, data: Images) -> None:
        """Compiles what `run` runs, for arrays like these: see `Compiled.compile`."""
        drawn = self._draw.compile(keys, self._indices)
        begun = self._begin.compile((carry, drawn[0]), None)
        self._loop.compile(begun, drawn, data, self._plan)
        self._end.compile((begun, drawn[0]), None)

    def run(
        self, carry: Carry, keys: jax.Array, data: Images, report: Report, first: int, keeper: Keeper | None
    ) -> Carry:
        """The pass from batch `first` on; before and after the loop, which donates, the carry is copied."""
        drawn = self._draw(keys, self._indices)
        carry = carry if first else self._begin((carry, drawn[0]), None)
        kept = _WithoutMetrics(keeper) if keeper else None
        carry, _ = self._loop.run(carry, drawn, data, 0, self._plan, report, first, kept)
        return self._end((carry, drawn[0]), None)  # type: ignore[no-any-return]


class _WithoutMetrics(NamedTuple):
    """A keeper that is not told a pass's metrics: they say nothing of the model."""

    keeper: Keeper

    def due(self) -> bool:
        return self.keeper.due()

    def keep(self, done: int, carry: Any, metrics: dict[str, np.ndarray]) -> None:
        self.keeper.keep(done, carry, {})
