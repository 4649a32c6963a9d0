"""The unlearning loop: runs any rule for the epochs of the protocol, all seeds together."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Batch, Images, augmented_batch, clean_batch, epoch_order
from jaxunlearn.devices.sharding import over_seeds, place_seeds, place_shared, seed_shapes, shard_batch
from jaxunlearn.errors import blamed
from jaxunlearn.methods.rule import Context, Pass, UnlearningRule
from jaxunlearn.models.network import Network
from jaxunlearn.progress import Report
from jaxunlearn.randomness import Stream, abstract_key, step_keys, stream_key
from jaxunlearn.registry import Method, build_rule, names
from jaxunlearn.training.checking import check_rule, same_form, traces
from jaxunlearn.training.history import Position
from jaxunlearn.training.loop import Chunk, Compiled, EpochLoop, Keeper, Timing, batch_sizes, chunks
from jaxunlearn.training.passes import Carry, Passing, carried


class Split(NamedTuple):
    """Which training images are kept and which are to be forgotten: indices i32[R] and i32[F], numpy's or JAX's."""

    retain: Any
    forget: Any


@dataclass(frozen=True)
class CleanSet:
    """The batches a rule's `prepare` looks at: not augmented, in file order."""

    data: Images
    indices: jax.Array
    protocol: Protocol

    def __iter__(self) -> Iterator[Batch]:
        size = self.protocol.batch_size
        for start in range(0, len(self.indices), size):
            yield clean_batch(self.data, self.indices[start : start + size], self.protocol)

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.protocol.batch_size)


def epoch_plan(protocol: Protocol, split: Split) -> list[tuple[int, int]]:
    """The batch sizes (retain, forget) of an epoch's steps.

    "min": as many steps as the smaller of the two has batches. "retain": as many as retain has; the forget images
    are gone through again and again, in a new order each time.

    Raises:
      UserError: no step is left (`drop_last` with fewer images than a batch).
    """
    retain = batch_sizes(len(split.retain), protocol.batch_size, protocol.drop_last, "retain")
    forget = batch_sizes(len(split.forget), protocol.batch_size, protocol.drop_last, "forget")
    steps = min(len(retain), len(forget)) if protocol.epoch_length == "min" else len(retain)
    return [(retain[i], forget[i % len(forget)]) for i in range(steps)]


def make_context(network: Network, protocol: Protocol, num_classes: int, steps_per_epoch: int) -> Context:
    """What a rule is told; the fixed optimizer is Adam."""
    adam = optax.adam(protocol.unlearn_lr, b1=protocol.adam_b1, b2=protocol.adam_b2, eps=protocol.adam_eps)
    return Context(
        **network._asdict(),
        optimizer=adam,
        learning_rate=protocol.unlearn_lr,
        eps=protocol.adam_eps,
        mean=tuple(protocol.mean),
        std=tuple(protocol.std),
        num_classes=num_classes,
        forget_class=protocol.forget_class,
        steps_per_epoch=steps_per_epoch,
        epochs=protocol.unlearn_epochs,
    )


class Unlearning:
    """One method on a group of seeds; of the hyperparameters in `numbers`, floats, each has its own value.

    Those are traced: every program builds the rule anew with what its state says they are.
    """

    def __init__(
        self,
        method: Method,
        network: Network,
        protocol: Protocol,
        num_classes: int,
        data: Images,
        split: Split,
        mesh: jax.sharding.Mesh,
        timing: Timing,
        numbers: Sequence[str] = (),
    ):
        sizes = epoch_plan(protocol, split)
        context = make_context(network, protocol, num_classes, len(sizes))
        self.steps_per_epoch, self.images_per_epoch = len(sizes), sum(map(sum, sizes))
        self._rule = build_rule(method, context)
        self.epochs = protocol.unlearn_epochs if self._rule.step else 0
        self.steps = self.steps_per_epoch * self.epochs
        self._plan: list[Chunk] = chunks(sizes)  # type: ignore[arg-type]
        self._protocol, self.mesh, self.timing = protocol, mesh, timing
        self._data = place_shared(data, mesh)
        self._split = place_shared(Split(*(part.astype(np.int32) for part in split)), mesh)
        self._initialise = network.initialise
        number = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(float))
        self._numbers = dict.fromkeys(numbers, number) if numbers else ()
        self._method, self._context, self._sizes = method, context, sorted(set(sizes))
        forget_batches = len(batch_sizes(len(split.forget), protocol.batch_size, protocol.drop_last, "forget"))
        passes = math.ceil(len(sizes) / forget_batches)

        def draw(key: jax.Array, shared: tuple[Any, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            split, epoch = shared
            keys = step_keys(key, Stream.UNLEARN, epoch, self.steps_per_epoch, uses=3)
            retain_key, forget_key = jax.random.split(stream_key(key, Stream.UNLEARN_ORDER, epoch))
            return keys, (epoch_order(retain_key, split.retain)[0], epoch_order(forget_key, split.forget, passes))

        self._start = jax.jit(over_seeds(self._init, mesh))
        self._draw = Compiled(over_seeds(draw, mesh), timing)
        step = _unlearn_step(self._rule_of, protocol, len(sizes), forget_batches)
        self._loop = EpochLoop(step, mesh, timing)
        sets = split._asdict() | {"all": np.sort(np.concatenate(split))}
        self._passes = [
            Passing(partial(self._pass_of, number), number, sets[one.over], protocol, mesh, timing)
            for number, one in enumerate(self._rule.passes)
        ]
        self.passes = len(self._passes)

    def check(self) -> None:
        """Raises UserError for a user's rule that does not keep its contract, before anything is computed."""
        if self._method.name not in names():  # those are checked by tests; a trace takes one to three seconds
            check_rule(self._method, self._rule, self._context, self._sizes)

    def takes_numbers(self) -> bool:
        """Whether the rule can be traced without a value for its numbers: one that looks at them cannot."""
        return traces(self._rule_of, self._context, self._sizes[0], self._numbers)

    def start(
        self, params: Any, batch_stats: Any, keys: jax.Array, numbers: Mapping[str, Sequence[float]] | None = None
    ) -> Carry:
        """The state before the first step. The models given, the seed axis in front, are left as they are.

        Args:
          numbers: by name, for each of the models.
        """
        numbers = numbers or {}
        values = {name: np.asarray(numbers[name], x.dtype) for name, x in dict(self._numbers).items()}
        with self.timing("compile_s"):
            own = params, batch_stats, *place_seeds((keys, values or ()), self.mesh)
            carry = self._start(own, None)
            jax.block_until_ready(carry)
        if self._rule.prepare is None:
            return carry
        prepared = []
        for i in range(len(keys)):
            own_numbers = {name: float(numbers[name][i]) for name in numbers}
            prepared.append(self._prepare(jax.tree.map(lambda x, i=i: x[i], carry), keys[i], own_numbers))
        return place_seeds(jax.tree.map(lambda *leaves: jnp.stack(leaves), *prepared), self.mesh)

    def abstract(self, position: Position) -> Carry:
        """Shapes and dtypes of one seed's state at a position: within a pass there is more."""
        key = abstract_key()
        carry = jax.eval_shape(self._init, (*jax.eval_shape(self._initialise, key), key, self._numbers), None)
        if position.epoch >= 0 or position.step == 0:
            return carry
        return jax.eval_shape(self._passes[position.epoch].begin, carry, key)

    def _rule_of(self, numbers: Any) -> UnlearningRule:
        """The rule with these numbers, as it is where there are none."""
        own = self._method.hyperparameters | dict(numbers)
        return build_rule(self._method._replace(hyperparameters=own), self._context) if numbers else self._rule

    def _pass_of(self, number: int, numbers: Any) -> Pass:
        return self._rule_of(numbers).passes[number]

    def _init(self, own: tuple[Any, Any, jax.Array, Any], shared: None) -> Carry:
        params, batch_stats, key, numbers = own
        state = self._rule_of(numbers).init(params, batch_stats, stream_key(key, Stream.RULE))
        # Copies, because the loop donates: a teacher must not share its buffers with the student.
        return jax.tree.map(jnp.copy, carried(params, state, numbers))

    def _prepare(self, carry: Carry, key: jax.Array, numbers: Mapping[str, float]) -> Carry:
        rule = self._rule_of(numbers)
        assert rule.prepare is not None
        zero, key = place_shared((jnp.zeros((), jnp.int32), stream_key(key, Stream.RULE)), self.mesh)
        before = state = carry.state(key, zero, zero)
        sets = (CleanSet(self._data, indices, self._protocol) for indices in self._split)
        with blamed(f"method '{self._method.name}': its prepare() failed"):
            params, state = rule.prepare(carry.params, state, *sets)
            same_form("prepare", ("params", carry.params, params), ("state", before, state))
        return carried(params, state, carry.numbers)

    def compile(self, num_seeds: int) -> None:
        """Compiles what passes and epochs of so many seeds run: see `Compiled.compile`. Not while it is used
        otherwise."""
        keys = seed_shapes(abstract_key(), num_seeds, self.mesh)
        carry = seed_shapes(self.abstract(Position(0, 0)), num_seeds, self.mesh)
        for one in self._passes:
            one.compile(carry, keys, self._data)
        if self.epochs:
            drawn = self._draw.compile(keys, (self._split, place_shared(np.int32(0), self.mesh)))
            self._loop.compile(carry, drawn, self._data, self._plan)

    def epoch(
        self,
        carry: Carry,
        keys: jax.Array,
        epoch: int,
        report: Report = lambda done, metrics: None,
        first: int = 0,
        keeper: Keeper | None = None,
    ) -> tuple[Carry, dict[str, np.ndarray]]:
        """One epoch of all seeds from step `first` on; `carry` is donated. The passes are the epochs before 0.

        Returns (carry, the rule's metrics f32[S, steps from `first` on], none of a pass).
        """
        keys = place_seeds(keys, self.mesh)
        if epoch < 0:
            return self._passes[epoch].run(carry, keys, self._data, report, first, keeper), {}
        drawn = self._draw(keys, (self._split, place_shared(np.int32(epoch), self.mesh)))
        return self._loop.run(carry, drawn, self._data, epoch, self._plan, report, first, keeper)


def _unlearn_step(
    rule_of: Callable[[Any], UnlearningRule], protocol: Protocol, steps: int, forget_batches: int
) -> Callable[..., Any]:
    augments = protocol.unlearn_augment

    def step(
        carry: Carry,
        seeded: tuple[jax.Array, tuple[jax.Array, jax.Array]],
        data: Images,
        epoch: jax.Array,
        index: jax.Array,
        sizes: tuple[int, int],
    ) -> tuple[Carry, dict[str, jax.Array]]:
        keys, (retain_order, forget_orders) = seeded
        retain_key, forget_key, rule_key = keys[index]
        size = protocol.batch_size
        retain_chosen = jax.lax.dynamic_slice(retain_order, (index * size,), sizes[:1])
        place = (index // forget_batches, index % forget_batches * size)
        forget_chosen = jax.lax.dynamic_slice(forget_orders, place, (1, sizes[1]))[0]
        retain, forget = (
            shard_batch(
                augmented_batch(data, chosen, key, protocol) if augments else clean_batch(data, chosen, protocol)
            )
            for chosen, key in ((retain_chosen, retain_key), (forget_chosen, forget_key))
        )
        state = carry.state(rule_key, epoch * steps + index, epoch)
        rule = rule_of(carry.numbers)
        assert rule.step is not None  # or there is no epoch
        params, state, metrics = rule.step(carry.params, state, retain, forget)
        return carried(params, state, carry.numbers), metrics

    return step
