"""Bursts of pretraining and unlearning steps on synthetic images, timed on request: what `jaxunlearn speed` runs.

Each side of a comparison is a process of its own that waits for the name of a quantity, runs a burst of its steps and
answers with the seconds of one step. So two sides take turns, a burst each, and share whatever the machine is doing.
"""

import dataclasses
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images
from jaxunlearn.devices.ceilings import copy_rate, matmul_rate
from jaxunlearn.devices.configuration import (
    cache_configured,
    computing,
    default_precision,
    programs_kept,
    request_devices,
    within_memory,
)
from jaxunlearn.devices.sharding import make_mesh, place_shared
from jaxunlearn.errors import UserError
from jaxunlearn.models import build
from jaxunlearn.models.layers import Conv, Linear
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import BASELINES, get_method
from jaxunlearn.results.environment import environment
from jaxunlearn.training.loop import Timing, scans
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.unlearning import Split, Unlearning

PRETRAIN = "pretrain"
# SCRUB takes two steps of Adam in its first epochs and one later: the second name stands for the first epochs.
SCRUB_FIRST = "scrub, first epochs"
QUANTITIES = (PRETRAIN, *BASELINES, SCRUB_FIRST)

BURST_SECONDS = 2.0  # at least; an epoch at least


def epoch_steps(protocol: Protocol, num_classes: int) -> int:
    """Steps between two waits for the device: about two seconds of a CPU. Unlearning's real epochs have 4 to 47."""
    return 100 if scans() else max(4, round(600e6 / multiply_adds(protocol, num_classes)))


def synthetic(protocol: Protocol, num_classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise u8[count, 32, 32, channels] and labels i32[count], the same for every side."""
    rng = np.random.default_rng(0)
    channels = 1 if len(set(protocol.mean)) == 1 else 3
    images = rng.integers(0, 256, (count, 32, 32, channels), np.uint8)
    return images, rng.integers(0, num_classes, count).astype(np.int32)


def side(connection: Connection, serve: Callable[..., None], *arguments: Any) -> None:
    """`serve(connection, *arguments)`, a UserError of which goes to the other end."""
    try:
        with within_memory():
            serve(connection, *arguments)
    except UserError as error:
        connection.send(error)
    except KeyboardInterrupt:
        pass  # a terminal interrupts both ends, and the other one says so


def answer(
    connection: Connection,
    about: dict[str, Any],
    bursts: Mapping[str, tuple[int, Callable[[], None]]],
    close: Callable[[], Any],
) -> None:
    """Says `about`, then answers every name in `bursts`, (steps, what runs so many), with the seconds of a step.

    The answer to None, the last, is `close()`.
    """
    connection.send(about)
    repeats: dict[str, int] = {}
    while (name := connection.recv()) is not None:
        steps, run = bursts[name]
        if name not in repeats:
            run()
            start = time.perf_counter()
            run()
            repeats[name] = max(1, round(BURST_SECONDS / (time.perf_counter() - start)))
        for _ in ("untimed", "timed"):  # a process that was idle while the other side ran is slower for seconds
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
        connection.send((time.perf_counter() - start) / (repeats[name] * steps))
    connection.send(close())


class Burst:
    """Epochs of one of `QUANTITIES`.

    Its Pretraining or Unlearning is made at the first call, which alone compiles: into `programs`, a folder that is
    empty then. `metrics` are those of the last epoch.
    """

    def __init__(self, workload: "Workload", quantity: str, programs: Path):
        self._workload, self._quantity, self._programs = workload, quantity, programs
        self._epoch = 2 if quantity == "scrub" else 0
        self._run: Any = None
        self._state: Any = None
        self.metrics: dict[str, np.ndarray] = {}
        self.compile_s: float | None = None

    def __call__(self) -> None:
        """One epoch, to its end."""
        with jax.set_mesh(self._workload.mesh), computing(self._workload.protocol.precision):
            if self._run is None:
                self.compile_s = self._begin(0)
            else:
                self._advance(0)

    def compile_again(self) -> float:
        """Seconds that the same programs take with `programs` at hand, as a second process would take them."""
        self._run = self._state = None
        jax.clear_caches()
        with jax.set_mesh(self._workload.mesh), computing(self._workload.protocol.precision):
            # Where steps are dispatched one by one, the last one has all programs of an epoch.
            return self._begin(0 if scans() else self._workload.steps - 1)

    def _begin(self, first: int) -> float:
        timing = Timing()
        # The user's own cache may have these programs already.
        with cache_configured(jax_compilation_cache_dir=None), programs_kept(self._programs):
            self._run, self._state = self._workload.make(self._quantity, timing)
            self._advance(first)
        return timing["compile_s"]

    def _advance(self, first: int) -> None:
        self._state, self.metrics = self._run.epoch(self._state, self._workload.keys, self._epoch, first=first)
        jax.block_until_ready(self._state)


class Workload:
    """A benchmark's steps on synthetic images for `num_seeds` seeds together, over `devices` (None: all).

    An epoch has `steps`, None being as many as suit the platform.
    """

    def __init__(
        self, protocol: Protocol, num_classes: int, num_seeds: int, devices: int | None, steps: int | None = None
    ):
        self.protocol, self.num_classes = protocol, num_classes
        self.mesh, self.keys = make_mesh(num_seeds, devices), seed_keys(range(num_seeds))
        self.steps = steps or epoch_steps(protocol, num_classes)
        self._network = make_network(protocol, num_classes)

    def make(self, quantity: str, timing: Timing) -> tuple[Any, Any]:
        """A Pretraining or an Unlearning, and its first state."""
        return self._pretraining(timing) if quantity == PRETRAIN else self._unlearning(quantity, timing)

    def _images(self, sets: int) -> Images:
        images = synthetic(self.protocol, self.num_classes, sets * self.steps * self.protocol.batch_size)
        return place_shared(Images(*map(jnp.asarray, images)), self.mesh)

    def _pretraining(self, timing: Timing) -> tuple[Any, Any]:
        indices = np.arange(self.steps * self.protocol.batch_size)
        run = Pretraining(self._network, self.protocol, self._images(1), indices, self.mesh, timing)
        return run, run.start(self.keys)

    def _unlearning(self, quantity: str, timing: Timing) -> tuple[Any, Any]:
        count = self.steps * self.protocol.batch_size
        split = Split(np.arange(count), np.arange(count, 2 * count))
        method = get_method("scrub" if quantity == SCRUB_FIRST else quantity)
        run = Unlearning(
            method, self._network, self.protocol, self.num_classes, self._images(2), split, self.mesh, timing
        )
        params, batch_stats = jax.jit(jax.vmap(self._network.initialise))(self.keys)
        return run, run.start(params, batch_stats, self.keys)


def serve(
    connection: Connection,
    protocol: Protocol,
    num_classes: int,
    precision: str | None,
    num_seeds: int,
    devices: int | None,
    programs: Path,
) -> None:
    """This package's side: a step is one of all seeds. `precision` None is the platform's own.

    Says at first what the other side must know, {"precision", "platform", "steps"}, and closes with its report.
    `programs` is an empty folder: a quantity's programs are kept in one of their own there, since two may share some.
    """
    request_devices(devices)
    protocol = dataclasses.replace(protocol, precision=precision or default_precision())
    workload = Workload(protocol, num_classes, num_seeds, devices)
    bursts = {name: Burst(workload, name, programs / str(i)) for i, name in enumerate(QUANTITIES)}

    def close() -> dict[str, Any]:
        peak = peak_memory()  # before what takes more
        rate, copied = matmul_rate(protocol.precision), copy_rate()
        devices = 1 if jax.default_backend() == "cpu" else workload.mesh.size  # those of a CPU share its cores
        done = {name: burst for name, burst in bursts.items() if burst.compile_s is not None}
        return {
            "compile_s": {name: round(burst.compile_s or 0, 3) for name, burst in done.items()},
            "warm_compile_s": {name: round(burst.compile_again(), 3) for name, burst in done.items()},
            "peak_memory_gib": peak,
            "matmul_gflops": devices * rate / 1e9,
            "copy_gb_s": devices * copied / 1e9,
            "multiply_adds": multiply_adds(protocol, num_classes),
            "environment": environment() | {"device_count": workload.mesh.size},
        }

    about = {"precision": protocol.precision, "platform": jax.default_backend(), "steps": workload.steps}
    answer(connection, about, {name: (workload.steps, burst) for name, burst in bursts.items()}, close)


def multiply_adds(protocol: Protocol, num_classes: int) -> int:
    """Of an image's forward: those of the convolutions and linear layers; a training step takes three times as many."""
    model = build(
        protocol.model,
        num_classes,
        resnet_shortcut=protocol.resnet_shortcut,
        mobilenet_stride=protocol.mobilenet_stride,
        dtype=jnp.float32,
    )
    total = 0

    def count(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal total
        out = call(*args, **kwargs)
        if isinstance(context.module, Conv | Linear) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["kernel"]
            total += math.prod(out.shape) * (kernel.size // kernel.shape[-1])
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return total


def peak_memory() -> float:
    """GiB that this process took at most: of the device, or where that does not say (a CPU), of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats.get("peak_bytes_in_use", resident) / 2**30
