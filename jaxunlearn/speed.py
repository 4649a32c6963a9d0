"""Bursts of pretraining and unlearning steps on synthetic images, timed on request: what `jaxunlearn speed` runs.

Each side of a comparison is a process of its own that waits for the name of a quantity, runs a burst of its steps and
answers with the seconds of one step. So two sides take turns, a burst each, and share whatever the machine is doing.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.data.batches import Images
from jaxunlearn.devices.configuration import request_devices
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
MATMUL = 2048


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
        serve(connection, *arguments)
    except UserError as error:
        connection.send(error)


def answer(connection: Connection, bursts: dict[str, tuple[int, Callable[[], None]]], close: Callable[[], Any]) -> None:
    """Says "ready", then answers every name in `bursts`, (steps, what runs so many), with the seconds of a step.

    The first burst of a name is preceded by two that are not timed. The answer to None, the last, is `close()`.
    """
    connection.send("ready")
    repeats: dict[str, int] = {}
    while (name := connection.recv()) is not None:
        steps, run = bursts[name]
        if name not in repeats:
            run()
            start = time.perf_counter()
            run()
            repeats[name] = max(1, round(BURST_SECONDS / (time.perf_counter() - start)))
        start = time.perf_counter()
        for _ in range(repeats[name]):
            run()
        connection.send((time.perf_counter() - start) / (repeats[name] * steps))
    connection.send(close())


def serve(connection: Connection, protocol: Protocol, num_classes: int, num_seeds: int, devices: int | None) -> None:
    """This package's side: `num_seeds` vmapped over `devices`; a step is one of all seeds. Closes with its report."""
    request_devices(devices)
    steps, batch = epoch_steps(protocol, num_classes), protocol.batch_size
    network, mesh, keys = (
        make_network(protocol, num_classes),
        make_mesh(num_seeds, devices),
        seed_keys(range(num_seeds)),
    )
    compile_s: dict[str, float] = {}

    def burst(name: str, make: Callable[[Timing], tuple[Any, Any]], epoch: int) -> Callable[[], None]:
        """An epoch of what `make` makes, (a Pretraining or an Unlearning, its first state), made at the first call."""
        timing = Timing()
        made: list[Any] = []

        def run() -> None:
            with jax.set_mesh(mesh):
                if not made:
                    made[:] = make(timing)
                made[1], _ = made[0].epoch(made[1], keys, epoch)
                jax.block_until_ready(made[1])
                compile_s[name] = round(timing["compile_s"], 3)

        return run

    def images(sets: int) -> Images:
        return place_shared(Images(*map(jnp.asarray, synthetic(protocol, num_classes, sets * steps * batch))), mesh)

    def pretraining(timing: Timing) -> tuple[Any, Any]:
        run = Pretraining(network, protocol, images(1), np.arange(steps * batch), mesh, timing)
        return run, run.start(keys)

    def unlearning(method: str, timing: Timing) -> tuple[Any, Any]:
        split = Split(np.arange(steps * batch), np.arange(steps * batch, 2 * steps * batch))
        run = Unlearning(get_method(method), network, protocol, num_classes, images(2), split, mesh, timing)
        params, batch_stats = jax.jit(jax.vmap(network.initialise))(keys)
        return run, run.start(params, batch_stats, keys)

    def close() -> dict[str, Any]:
        rate = matmul_rate()
        return {
            "compile_s": compile_s,
            "peak_memory_gib": peak_memory(),
            "matmul_gflops": rate / 1e9,
            "multiply_adds": multiply_adds(protocol, num_classes),
            "environment": environment() | {"device_count": mesh.size},
        }

    bursts = {PRETRAIN: (steps, burst(PRETRAIN, pretraining, 0))}
    for name in BASELINES:
        later = 2 if name == "scrub" else 0
        bursts[name] = (steps, burst(name, functools.partial(unlearning, name), later))
    bursts[SCRUB_FIRST] = (steps, burst(SCRUB_FIRST, functools.partial(unlearning, "scrub"), 0))
    answer(connection, bursts, close)


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
            total += out.size * (kernel.size // kernel.shape[-1])
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return total


def matmul_rate() -> float:
    """The best FLOP/s of a float32 product of 2048 x 2048 matrices."""
    a = jnp.ones((MATMUL, MATMUL), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL**3 / best


def peak_memory() -> float:
    """GiB that this process took at most: of the device, or where that does not say (a CPU), of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats.get("peak_bytes_in_use", resident) / 2**30
