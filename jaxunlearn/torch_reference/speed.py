"""PyTorch's side of `jaxunlearn speed`: the same steps on the same device, as fast as PyTorch runs them.

channels_last, denormals flushed on a CPU, the images on the device and batches cut from them by one gather, and of the
multi-tensor and the fused optimizer whichever pretrains faster. Each quantity then runs in the fastest of `FORMS`.
"""

import itertools
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.errors import UserError, one_line
from jaxunlearn.registry import BASELINES
from jaxunlearn.speed import PRETRAIN, QUANTITIES, SCRUB_FIRST, answer, synthetic
from jaxunlearn.torch_reference import harness
from jaxunlearn.torch_reference.models import build

OPTIMIZERS = ("foreach", "fused")
GRAPHS = "CUDA graphs"
FORMS: dict[str, dict[str, Any] | None] = {  # the options of torch.compile
    "eager": None,
    "compiled": {},
    GRAPHS: {"mode": "reduce-overhead"},
}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("tf32", "fp32", "bf16")}
TRIALS = 2  # epochs, of which the faster counts


class Setting(NamedTuple):
    """How a step is run."""

    form: str
    precision: str

    def __str__(self) -> str:
        return f"{self.form}, {self.precision}"


class Steps:
    """Epochs of `count` steps on synthetic images on `device`, "cpu" or "cuda"."""

    def __init__(self, protocol: Protocol, num_classes: int, count: int, device: str):
        self.device, self.count = device, count
        self._protocol, self._classes = protocol, num_classes
        images, labels = synthetic(protocol, num_classes, 2 * count * protocol.batch_size)
        self._batches = harness.Batches(
            torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), protocol
        )

    def make(self, quantity: str, setting: Setting, optimizer: str) -> Callable[[], None]:
        """What runs an epoch of a quantity, to its end."""
        model = build(self._protocol, self._classes)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        options = FORMS[setting.form]
        if options is not None:
            harness.compiled(model, fullgraph=True, dynamic=False, **options)
        if quantity == PRETRAIN:
            sgd = harness.sgd(model, self._protocol, **{optimizer: True})

            def step(retain: torch.Tensor, forget: torch.Tensor) -> None:
                harness.pretrain_step(model, sgd, self._batches(retain))
        else:
            name, epoch = ("scrub", 0) if quantity == SCRUB_FIRST else (quantity, 2)
            adam, unlearn = harness.adam(model, self._protocol, **{optimizer: True}), harness.BASELINES[name](model)

            def step(retain: torch.Tensor, forget: torch.Tensor) -> None:
                unlearn(adam, self._batches(retain), self._batches(forget), epoch)

        def run() -> None:
            if self.device == "cuda":  # for all of the process, so before every epoch
                tf32 = setting.precision == "tf32"
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            with torch.autocast(self.device, torch.bfloat16, enabled=setting.precision == "bf16"):
                for retain, forget in self._orders():
                    if setting.form == GRAPHS:
                        torch.compiler.cudagraph_mark_step_begin()
                    step(retain, forget)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return run

    def _orders(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which retain and which forget images each step takes."""
        batch = self._protocol.batch_size
        images = self.count * batch
        halves = (half * images + torch.randperm(images, device=self.device) for half in range(2))
        return list(zip(*(half.split(batch) for half in halves), strict=True))


class Fastest:
    """An epoch of a quantity in the fastest of the settings, which are tried at the first call."""

    def __init__(self, make: Callable[[Setting], Callable[[], None]], settings: Sequence[Setting]):
        self._make, self._settings = make, settings
        self._run: Callable[[], None] | None = None
        self.setting: Setting | None = None
        self.left_out: dict[str, str] = {}  # why, by setting

    def __call__(self) -> None:
        if self._run is None:
            self._run = self._choose()
        self._run()

    def _choose(self) -> Callable[[], None]:
        best = float("inf")
        chosen = None
        for setting in self._settings:
            try:
                run = self._make(setting)
                run()
                seconds = min(_seconds(run) for _ in range(TRIALS))
            except Exception as error:  # there is no compiler, no Triton, no memory left, or the form cannot do it
                self.left_out[str(setting)] = one_line(error)
                continue
            if seconds < best:
                best, chosen, self.setting = seconds, run, setting
        if chosen is None:
            raise UserError(f"PyTorch runs in no form: {next(iter(self.left_out.values()))}")
        return chosen


def settings(device: str, precision: str, any_precision: bool) -> list[Setting]:
    """What is tried: on a CPU tf32 is fp32, and there are no CUDA graphs."""
    forms = [form for form in FORMS if device == "cuda" or form != GRAPHS]
    own = "fp32" if device == "cpu" and precision == "tf32" else precision
    return [Setting(*pair) for pair in itertools.product(forms, PRECISIONS[device] if any_precision else (own,))]


def serve(
    connection: Connection,
    protocol: Protocol,
    num_classes: int,
    count: int,
    platform: str,
    any_precision: bool,
) -> None:
    """Answers as `jaxunlearn.speed.serve` does, which said the `count` of an epoch's steps and JAX's `platform`.

    JAX itself is not used here: it would take memory of the device. Raises UserError where PyTorch lacks the device.
    """
    device = "cuda" if platform == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--against: PyTorch sees no GPU, but JAX does: install a PyTorch that is built for it")
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # forms, precisions and teachers share the code of the model's forward
    steps = Steps(protocol, num_classes, count, device)
    tried = settings(device, protocol.precision, any_precision)
    first = next((setting for setting in tried if setting.form == "eager"), tried[0])
    trials = {optimizer: steps.make(PRETRAIN, first, optimizer) for optimizer in OPTIMIZERS}
    seconds = {optimizer: min(_seconds(run) for _ in range(1 + TRIALS)) for optimizer, run in trials.items()}
    optimizer = min(seconds, key=seconds.__getitem__)
    del trials

    def fastest(quantity: str) -> Fastest:
        return Fastest(lambda setting: steps.make(quantity, setting, optimizer), tried)

    bursts = {name: fastest(name) for name in QUANTITIES}
    assert set(bursts) == {PRETRAIN, SCRUB_FIRST, *BASELINES}

    def close() -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "optimizer": optimizer,
            "settings": {name: burst.setting._asdict() for name, burst in bursts.items() if burst.setting},
            "left_out": {f"{name}: {what}": why for name, b in bursts.items() for what, why in b.left_out.items()},
            "peak_memory_gib": (torch.cuda.max_memory_reserved() if device == "cuda" else peak) / 2**30,
        }

    answer(connection, {}, {name: (count, burst) for name, burst in bursts.items()}, close)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
