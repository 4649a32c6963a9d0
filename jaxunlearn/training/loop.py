"""The epoch loop: runs a step over the batches of an epoch without waiting for the device.

On GPU and TPU the equal-sized steps of an epoch are one `lax.scan`, one dispatch. On CPU a step takes long beside its
dispatch, and an epoch long beside a user's patience: steps are dispatched one by one, so progress is seen. (A plain
`lax.conv`'s gradient is also many times slower inside a loop there; the package's layers are not.) Both give the same
result; a test says so.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.devices.sharding import everywhere, over_seeds, place_shared
from jaxunlearn.errors import UserError
from jaxunlearn.progress import Report

# Steps queued behind the running one: enough that the CPU never idles. Each may hold its memory from its dispatch on,
# 4.5 GB for MobileNetV2 with 256 images.
IN_FLIGHT = 1

# (carry, seeded, shared, epoch, index) -> (carry, metrics), for one seed; `sizes` are the step's batch sizes.
Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


class Chunk(NamedTuple):
    """A run of steps of an epoch whose batches have the same sizes: one compiled program serves them."""

    start: int
    length: int
    sizes: tuple[int, ...]


class Keeper(Protocol):
    """What is asked after every dispatch but the epoch's last whether it is due to `keep` the carry."""

    def due(self) -> bool: ...

    def keep(self, done: int, carry: Any, metrics: dict[str, np.ndarray]) -> None:
        """Gets the carry after `done` steps of the epoch, ready, and what `EpochLoop.run` would return beside it."""


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


class Compiled:
    """A jitted function that is compiled at its first call, for that call's shapes, on the clock of compilation.

    Or before it, by `compile`: then nothing waits for it, and the clock stands.
    """

    def __init__(self, function: Callable[..., Any], timing: Timing, **options: Any):
        self._jitted = jax.jit(function, **options)
        self._timing = timing
        self._program: jax.stages.Compiled | None = None

    def compile(self, *arguments: Any) -> Any:
        """Compiles for arrays like `arguments`, of which shapes and shardings will do. Returns those of the results."""
        if self._program is None:
            self._program = self._jitted.lower(*arguments).compile()
        shapes, shardings = self._program.out_info, self._program.output_shardings
        return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), shapes, shardings)

    def __call__(self, *arguments: Any) -> Any:
        if self._program is None:
            with self._timing("compile_s"):
                self._program = self._jitted.lower(*arguments).compile()
        return self._program(*arguments)


def batch_sizes(count: int, batch_size: int, drop_last: bool, kind: str) -> list[int]:
    """The sizes of the batches that `count` images make: all of `batch_size` but perhaps the last.

    Raises UserError where they make none; `kind` says there what images they are.
    """
    full, rest = divmod(count, batch_size)
    sizes = [batch_size] * full + ([rest] if rest and not drop_last else [])
    if count == 0:
        raise UserError(f"there are no {kind} images")
    if not sizes:
        remedy = "use a smaller --batch-size"
        raise UserError(f"drop_last leaves no batch of {batch_size} of the {count} {kind} images: {remedy}")
    return sizes


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
        self._programs: dict[tuple[tuple[int, ...], int], Compiled] = {}

    def run(
        self,
        carry: Any,
        seeded: Any,
        shared: Any,
        epoch: int,
        plan: list[Chunk],
        report: Report = lambda done, metrics: None,
        first: int = 0,
        keeper: Keeper | None = None,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """One epoch, from step `first` on. `carry` is donated; the others are only read.

        Returns (carry, metrics f32[seeds, steps from `first` on]).
        """
        queue: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        outputs: list[dict[str, jax.Array]] = []

        def wait(behind: int) -> None:
            while len(queue) > behind:
                done, ready = queue.popleft()
                report(done, jax.block_until_ready(ready))

        def gathered() -> dict[str, np.ndarray]:
            fetched = jax.device_get(outputs)
            return {name: np.concatenate([m[name] for m in fetched], axis=1) for name in fetched[0]}

        for start, length, sizes in self._dispatches(plan, first):
            now = place_shared((np.int32(epoch), np.int32(start)), self._mesh)
            carry, metrics = self._program(sizes, length)(carry, seeded, shared, now)
            outputs.append(metrics)
            queue.append((start + length, metrics))
            wait(IN_FLIGHT)
            done = start + length
            if keeper and done < plan[-1].start + plan[-1].length and keeper.due():
                wait(0)
                keeper.keep(done, jax.block_until_ready(carry), gathered())
        wait(0)
        return carry, gathered()

    def compile(self, carry: Any, seeded: Any, shared: Any, plan: list[Chunk]) -> None:
        """Compiles all that `run` dispatches of whole epochs: see `Compiled.compile`."""
        now = place_shared((np.int32(0), np.int32(0)), self._mesh)
        for _, length, sizes in self._dispatches(plan, 0):
            self._program(sizes, length).compile(carry, seeded, shared, now)

    def _dispatches(self, plan: list[Chunk], first: int) -> Iterator[Chunk]:
        for start, length, sizes in plan:
            begin, end = max(start, first), start + length
            if scans() and begin < end:
                yield Chunk(begin, end - begin, sizes)
            elif not scans():
                yield from (Chunk(step, 1, sizes) for step in range(begin, end))

    def _program(self, sizes: tuple[int, ...], length: int) -> Compiled:
        """The program of `length` steps of these `sizes`."""
        if (sizes, length) not in self._programs:

            def one_seed(own: tuple[Any, Any], common: tuple[Any, Any]) -> tuple[Any, dict[str, jax.Array]]:
                (carry, seeded), (shared, (epoch, start)) = own, common

                def step(carry: Any, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
                    return self._step(carry, seeded, shared, epoch, index, sizes)

                if scans():
                    return jax.lax.scan(step, carry, start + jnp.arange(length))
                carry, metrics = step(carry, start)
                return carry, {name: value[None] for name, value in metrics.items()}

            def program(carry: Any, seeded: Any, shared: Any, now: Any) -> Any:
                carry, metrics = over_seeds(one_seed, self._mesh)((carry, seeded), (shared, now))
                return carry, everywhere(metrics, self._mesh)

            self._programs[sizes, length] = Compiled(program, self._timing, donate_argnums=0)
        return self._programs[sizes, length]
