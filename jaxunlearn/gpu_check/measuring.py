"""What the process of one arm does: `python -m jaxunlearn.gpu_check.measuring [--tiny] WORDS` prints JSON lines."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxunlearn import speed
from jaxunlearn.benchmarks import Protocol, get_benchmark
from jaxunlearn.data.datasets import DATASETS
from jaxunlearn.devices import ceilings as device
from jaxunlearn.errors import one_line
from jaxunlearn.files import acquire, make_lock
from jaxunlearn.gpu_check.agreement import agreement
from jaxunlearn.gpu_check.arms import FORMS, MODELS
from jaxunlearn.gpu_check.kernels import profiled
from jaxunlearn.gpu_check.schedule import TURN, TURN_TAKEN
from jaxunlearn.ops import blocks, convolution

LARGE = 60_000  # characters of a program: those of a training step have some 300,000, those around it a few thousand
STEPS = 100  # of an epoch of PyTorch's: as many as ours has on a GPU
DIGITS = ("--bench", "resnet20-digits-class0")
TINY_DIGITS = (
    "--batch-size",
    "4",
    "--pretrain-epochs",
    "1",
    "--unlearn-epochs",
    "1",
    "--train-limit",
    "40",
    "--method",
    "retain_finetune",
    "--no-against-retrain",
)


class Turn:
    """The right to compile and measure, which one arm has at a time, from the first large program to its end."""

    def __init__(self) -> None:
        self._lock = make_lock(Path(os.environ[TURN])) if TURN in os.environ else None
        self.taken, self.waited_s = False, 0.0
        self.program: jax.stages.Compiled | None = None  # the last large one

    def take(self) -> None:
        if not self.taken:
            self.taken, start = True, time.perf_counter()
            if self._lock:
                acquire(self._lock, -1, "choose another TMPDIR")
            self.waited_s = time.perf_counter() - start
            print(TURN_TAKEN, flush=True)

    def take_before_compiling(self) -> None:
        """So that what comes before, imports and traces, can be done while another arm measures."""
        compile_now = jax.stages.Lowered.compile

        def compile_in_turn(lowered: jax.stages.Lowered, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
            if len(lowered.as_text()) < LARGE:
                return compile_now(lowered, *args, **kwargs)
            self.take()
            self.program = compile_now(lowered, *args, **kwargs)
            return self.program

        jax.stages.Lowered.compile = compile_in_turn  # type: ignore


def protocol_of(model: str, precision: str, tiny: bool) -> tuple[Protocol, int]:
    """The benchmark of a model, and its number of classes."""
    protocol = dataclasses.replace(get_benchmark(MODELS[model]), precision=precision)
    return dataclasses.replace(protocol, batch_size=2) if tiny else protocol, DATASETS[protocol.dataset].num_classes


def clock(run: Callable[[], Any], tiny: bool) -> float:
    """Seconds of one `run`, a burst of which takes about two."""
    start = time.perf_counter()
    run()
    repeats = 1 if tiny else max(1, round(speed.BURST_SECONDS / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def ceilings(turn: Turn, tiny: bool) -> dict[str, Any]:
    if tiny:
        device.MATMUL_CPU, device.COPIED_CPU = 64, 1 << 16
    turn.take()
    rates = {f"{p}_tflops": round(device.matmul_rate(p) / 1e12, 4) for p in ("fp32", "tf32", "bf16")}
    return rates | {"copy_gb_s": round(device.copy_rate() / 1e9, 1), "jax": jax.__version__, "device": _kind()}


def agree(turn: Turn, tiny: bool, model: str) -> dict[str, Any]:
    found = agreement(*protocol_of(model, "fp32", tiny), 4 if tiny else 32, turn.take_before_compiling)
    return found | {"device": _kind()}


def train(turn: Turn, tiny: bool, model: str, precision: str, seeds: str, width: str) -> dict[str, Any]:
    if width == "vmap":
        seedwise = convolution.seedwise
        convolution.seedwise = lambda function, *arrays, together: seedwise(function, *arrays)
    else:
        images, kernels = map(int, width.split("-"))
        blocks.WIDTHS = dict.fromkeys(blocks.WIDTHS, (images, kernels))
    protocol, classes = protocol_of(model, precision, tiny)
    turn.take_before_compiling()
    workload = speed.Workload(protocol, classes, int(seeds), 1, steps=1 if tiny else None)
    with tempfile.TemporaryDirectory() as programs:
        burst = speed.Burst(workload, speed.PRETRAIN, Path(programs))
        burst()
        compile_s = (burst.compile_s or 0) - turn.waited_s
        turn.take()
        seconds, found = clock(burst, tiny), profiled(burst, workload.steps)
    images = int(seeds) * workload.steps * protocol.batch_size
    text = turn.program.as_text() or "" if turn.program else ""
    calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return {
        "images_per_s": round(images / seconds, 1),
        "step_ms": round(1e3 * seconds / workload.steps, 4),
        "compile_s": round(compile_s, 2),
        "peak_gib": round(speed.peak_memory(), 2),
        "calls": dict(calls),
        "transposes": text.count(" transpose("),
        "loss": round(float(burst.metrics["loss"].mean()), 4),
        "device": _kind(),
    } | found


def torch(turn: Turn, tiny: bool, model: str, precision: str, *forms: str) -> Iterator[dict[str, Any]]:
    """A line for each form of PyTorch, of which one may fail; one that says so where PyTorch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        yield {"skipped": "PyTorch is not installed"}
        return

    from jaxunlearn.torch_reference.speed import Setting, Steps

    protocol, classes = protocol_of(model, precision, tiny)
    torch.backends.cudnn.benchmark = True
    turn.take()
    steps = Steps(protocol, classes, 1 if tiny else STEPS, "cuda" if torch.cuda.is_available() else "cpu")
    for form in forms:
        start = time.perf_counter()
        try:
            run = steps.make(speed.PRETRAIN, Setting(FORMS[form], precision), "fused")
            run()
            first_s, seconds = time.perf_counter() - start, clock(run, tiny)
            rate = steps.count * protocol.batch_size / seconds
            row = {"images_per_s": round(rate, 1), "step_ms": round(1e3 * seconds / steps.count, 4)}
            row["first_s"] = round(first_s, 1)
        except Exception as error:
            row = {"error": one_line(error)}  # type: ignore[dict-item]
        yield {"form": form} | row | {"torch": torch.__version__}


def digits(turn: Turn, tiny: bool) -> dict[str, Any]:
    """A whole run compiled, again with its programs kept, and with deterministic operations: seconds, and same bits?"""
    turn.take()
    bits, seconds, programs = {}, {}, {}
    # The user's own cache may have these programs already.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    kept = {"cold": (), "warm": ("xla", "kernels"), "deterministic": ("kernels",)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"  # of one name: in another jax 0.10 would not find the programs again
        for kind, parts in kept.items():
            flags = ("--deterministic",) if kind == "deterministic" else ()
            for part in cache.glob("*"):
                if part.name not in parts:
                    shutil.rmtree(part)
            where = (
                "--cache-dir",
                cache,
                "--out",
                folder / f"{kind}-out",
                "--export-weights",
                folder / f"{kind}-weights",
            )
            command = [
                sys.executable,
                "-m",
                "jaxunlearn",
                "bench",
                *DIGITS,
                *(TINY_DIGITS if tiny else ()),
                *flags,
                *where,
            ]
            start = time.perf_counter()
            done = subprocess.run(
                list(map(str, (*command, "--quiet", "--json"))),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            if done.returncode:
                raise SystemExit(f"the {kind} run ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            seconds[f"{kind}_s"] = round(time.perf_counter() - start, 1)
            files = sorted((folder / f"{kind}-weights").rglob("*.safetensors"))
            bits[kind] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
            programs[kind] = len(list((cache / "xla").glob("*-cache")))
    same = {f"{kind}_same_bits": bits[kind] == bits["cold"] for kind in ("warm", "deterministic")}
    return seconds | same | {"programs": programs["cold"], "compiled_again": programs["warm"] - programs["cold"]}


def _kind() -> str:
    return jax.devices()[0].device_kind


def main(words: list[str]) -> None:
    """Runs the arm that the words name and prints its line."""
    tiny = "--tiny" in words
    name, *rest = (word for word in words if word != "--tiny")
    if tiny:  # compiles in a third of the time
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
        jax.config.update("jax_disable_most_optimizations", True)
    arm: Callable[..., Any] = {f.__name__: f for f in (ceilings, agree, train, torch, digits)}[name]
    found = arm(Turn(), tiny, *rest)
    for result in [found] if isinstance(found, dict) else found:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
