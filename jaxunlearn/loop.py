"""The epoch loop: runs a step over the batches of an epoch without waiting for the device.

On GPU and TPU the equal-sized steps of an epoch are one `lax.scan`. On CPU they are dispatched one by one: XLA's CPU
convolutions miss their fast path inside a loop (ResNet-20, batch 32, one core: 179 ms a step, 5,702 ms scanned).
Both give the same result; a test says so.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxunlearn import branches
from jaxunlearn.sharding import over_seeds, place_shared

IN_FLIGHT = 2  # steps queued ahead on the CPU: enough that it never idles, few enough to stop and report soon

# (carry, seeded, shared, epoch, index) -> (carry, metrics), for one seed; `sizes` are the step's batch sizes.
Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


class Chunk(NamedTuple):
    """A run of steps of an epoch whose batches have the same sizes: one compiled program serves them."""

    start: int
    length: int
    sizes: tuple[int, ...]


class Timing(dict[str, float]):
    """Seconds by what they were spent on; `with timing("compile_s")` adds to one. Nested times count once."""

    def __init__(self) -> None:
        super().__init__()
        self._inner = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            inner = self._inner.pop()
            self[name] = self.get(name, 0.0) + elapsed - inner
            self._inner[-1] += elapsed


def batch_sizes(count: int, batch_size: int, drop_last: bool) -> list[int]:
    """The sizes of the batches that `count` images make: all of `batch_size` but perhaps the last."""
    full, rest = divmod(count, batch_size)
    return [batch_size] * full + ([rest] if rest and not drop_last else [])


def chunks(steps: list[tuple[int, ...]]) -> list[Chunk]:
    """Groups the batch sizes of an epoch's steps into runs of equal ones."""
    result, start = [], 0
    for sizes, run in itertools.groupby(steps):
        length = len(list(run))
        result.append(Chunk(start, length, sizes))
        start += length
    return result


def scans() -> bool:
    """Whether this platform scans epochs."""
    return jax.default_backend() != "cpu"


class EpochLoop:
    """Compiles a one-seed step for every batch size it meets, and runs epochs of it for all seeds."""

    def __init__(self, step: Step, mesh: jax.sharding.Mesh, timing: Timing):
        self._step = step
        self._mesh = mesh
        self._timing = timing
        self._traced: dict[tuple[int, ...], ClosedJaxpr] = {}  # on platforms that do not scan
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(
        self,
        carry: Any,
        seeded: Any,
        shared: Any,
        epoch: int,
        plan: list[Chunk],
        report: Callable[[int, dict[str, jax.Array]], None] = lambda done, metrics: None,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """One epoch. `carry` is donated; the others are only read. `report(steps done, metrics)` gets ready metrics.

        Returns (carry, metrics f32[seeds, steps]).
        """
        queue: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        outputs: list[dict[str, jax.Array]] = []
        for start, length, sizes in self._dispatches(plan):
            now = place_shared((np.int32(epoch), np.int32(start)), self._mesh)
            program = self._program(sizes, length, epoch, (carry, seeded, shared, now))
            carry, metrics = program(carry, seeded, shared, now)
            outputs.append(metrics)
            queue.append((start + length, metrics))
            if len(queue) > IN_FLIGHT:
                done, ready = queue.popleft()
                report(done, jax.block_until_ready(ready))
        while queue:
            done, ready = queue.popleft()
            report(done, jax.block_until_ready(ready))
        fetched = jax.device_get(outputs)
        return carry, {name: np.concatenate([m[name] for m in fetched], axis=1) for name in fetched[0]}

    def _dispatches(self, plan: list[Chunk]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        for chunk in plan:
            if scans():
                yield chunk
            else:
                yield from ((chunk.start + i, 1, chunk.sizes) for i in range(chunk.length))

    def _program(self, sizes: tuple[int, ...], length: int, epoch: int, arguments: tuple[Any, ...]) -> Any:
        """The compiled program of `length` steps of these `sizes`, for the branches that `epoch` takes."""
        if (key := self._key(sizes, length, epoch)) in self._programs:
            return self._programs[key]

        def one_seed(own: tuple[Any, Any], common: tuple[Any, Any]) -> tuple[Any, dict[str, jax.Array]]:
            (carry, seeded), (shared, (now, start)) = own, common

            def step(now: jax.Array, carry: Any, seeded: Any, shared: Any, index: jax.Array) -> Any:
                return self._step(carry, seeded, shared, now, index, sizes)

            if scans():
                steps = start + jnp.arange(length)
                return jax.lax.scan(lambda carry, index: step(now, carry, seeded, shared, index), carry, steps)
            inputs = (now, carry, seeded, shared, start)
            traced, shapes = jax.make_jaxpr(step, return_shape=True)(*inputs)
            self._traced[sizes] = traced
            outputs = branches.run(traced, branches.decide(traced, epoch), *jax.tree.leaves(inputs))
            carry, metrics = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
            return carry, {name: value[None] for name, value in metrics.items()}

        def program(carry: Any, seeded: Any, shared: Any, now: Any) -> Any:
            return over_seeds(one_seed, self._mesh)((carry, seeded), (shared, now))

        with self._timing("compile_s"):
            compiled = jax.jit(program, donate_argnums=0).lower(*arguments).compile()
        self._programs[self._key(sizes, length, epoch)] = compiled
        return compiled

    def _key(self, sizes: tuple[int, ...], length: int, epoch: int) -> tuple[Any, ...]:
        """What a program is compiled for; the branches are known once a step of these sizes has been traced."""
        return sizes, length, branches.decide(self._traced[sizes], epoch) if sizes in self._traced else ()
