"""PyTorch's side of `jaxunlearn speed`: the same steps, as fast as eager PyTorch runs them on the CPU.

channels_last, all cores, denormals flushed, batches cut by one gather, and of the multi-tensor and the fused optimizer
whichever pretrains faster.
"""

import contextlib
import functools
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.registry import BASELINES
from jaxunlearn.speed import PRETRAIN, SCRUB_FIRST, answer, epoch_steps, synthetic
from jaxunlearn.torch_reference import harness
from jaxunlearn.torch_reference.models import build

OPTIMIZERS = ("foreach", "fused")


def serve(connection: Connection, protocol: Protocol, num_classes: int) -> None:
    """Answers as `jaxunlearn.speed.serve` does."""
    torch.set_flush_denormal(True)
    steps, batch = epoch_steps(protocol, num_classes), protocol.batch_size
    images, labels = map(torch.from_numpy, synthetic(protocol, num_classes, 2 * steps * batch))
    batches = harness.Batches(images, labels, protocol)
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    precision = bf16 if protocol.precision == "bf16" else contextlib.nullcontext

    def orders() -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which retain and which forget images each step takes."""
        halves = torch.randperm(steps * batch), steps * batch + torch.randperm(steps * batch)
        return list(zip(*(half.split(batch) for half in halves), strict=True))

    def pretrain(optimizer: str) -> Callable[[], None]:
        model = build(protocol, num_classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sgd = harness.sgd(model, protocol, **{optimizer: True})

        def run() -> None:
            for order, _ in orders():
                with precision():
                    harness.pretrain_step(model, sgd, batches(order))

        return run

    def unlearn(name: str, epoch: int, optimizer: str) -> Callable[[], None]:
        model = build(protocol, num_classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        adam, step = harness.adam(model, protocol, **{optimizer: True}), harness.BASELINES[name](model)

        def run() -> None:
            for retain, forget in orders():
                with precision():
                    step(adam, batches(retain), batches(forget), epoch)

        return run

    trials = {optimizer: pretrain(optimizer) for optimizer in OPTIMIZERS}
    seconds = {optimizer: min(_seconds(run) for _ in range(3)) for optimizer, run in trials.items()}
    optimizer = min(seconds, key=seconds.__getitem__)
    bursts = {PRETRAIN: (steps, trials[optimizer])}
    bursts |= {name: (steps, unlearn(name, 2, optimizer)) for name in BASELINES}
    bursts[SCRUB_FIRST] = (steps, unlearn("scrub", 0, optimizer))

    def close() -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        version = torch.__version__
        return {"torch": version, "threads": torch.get_num_threads(), "optimizer": optimizer, "peak_memory_gib": peak}

    answer(connection, bursts, close)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
