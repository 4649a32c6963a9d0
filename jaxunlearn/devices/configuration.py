"""JAX's settings for a run. What a user has set before stays as it is."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxunlearn.errors import UserError

MOST_DEVICES = 256  # of one machine: XLA starts as many threads as it is told to, and dies of too many
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU's memory, that JAX takes
# In errors of no class of their own: XLA's, CUDA's, and those of cuDNN and cuBLAS.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out.of.memory|ALLOC_FAILED", re.IGNORECASE)
DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"


def request_devices(count: int | None, deterministic: bool = False) -> None:
    """Makes `count` host devices, at most one a core, where JAX runs on CPUs and has not been used before.

    `deterministic` keeps XLA from operations that add in any order, which only GPUs have. Raises UserError where it is
    too late for that.
    """
    if deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        if _in_use():
            raise UserError("--deterministic: JAX is in use already, and reads it only once: start this process anew")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    # A step's buffers are then taken by the thread that calls it, from the one heap that grows without bound, so that
    # freed ones serve again (`memory.py`). Other threads' are mapped and unmapped; made to share that heap, they leave
    # it in pieces: 8 GB, not 2, for MobileNetV2. Nothing is lost: the loop waits for all steps but one anyway.
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if count is None or count < 2:
        return
    # Devices wait for each other on a thread each; with no more threads than devices XLA's CPU collectives can lock up.
    os.environ.setdefault("NPROC", str(4 * max(min(count, MOST_DEVICES), os.cpu_count() or 1)))
    already_asked = jax.config.values["jax_num_cpu_devices"] > 0
    if already_asked or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or _in_use():
        return  # `make_mesh` says how many there are
    jax.config.update("jax_num_cpu_devices", min(count, os.cpu_count() or 1))


def _in_use() -> bool:
    """Whether JAX has started its backends: then it refuses other settings of theirs."""
    before = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", before + 2)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


@contextmanager
def restored(*names: str) -> Iterator[None]:
    """Leaves JAX's settings of these names as they were before."""
    before = {name: jax.config.values[name] for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@contextmanager
def cache_configured(**settings: str | float | None) -> Iterator[None]:
    """Gives JAX's compilation cache other settings for what is compiled inside."""
    try:
        with restored(*settings):
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # it keeps the folder that it was first used with
            yield
    finally:
        compilation_cache.reset_cache()


def programs_kept(cache_dir: Path) -> AbstractContextManager[None]:
    """Keeps what is compiled inside in `cache_dir`/xla, unless JAX has been given a compilation cache already."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return nullcontext()
    settings: dict[str, str | float | None] = {"jax_compilation_cache_dir": str(cache_dir.absolute() / "xla")}
    settings["jax_persistent_cache_min_compile_time_secs"] = 0.1
    if jax.default_backend() == "cpu":
        # Its path is part of every key before jax 0.11, and what a folder held was lost when it was moved or copied.
        settings["jax_persistent_cache_enable_xla_caches"] = ""
    return cache_configured(**settings)


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises UserError in place of JAX's own error where what is computed inside does not fit the device's memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        remedy = "take fewer seeds together or a smaller batch"
        if jax.default_backend() == "gpu":
            remedy += f", or another fraction of the device for JAX ({FRACTION}, now {os.environ.get(FRACTION, '.75')})"
        raise UserError(f"out of device memory: {remedy}") from None


def default_precision() -> str:
    """What a computation that nobody has set is in: on a GPU what PyTorch's own convolutions are in by default."""
    return "tf32" if jax.default_backend() == "gpu" else "fp32"


def computing(precision: str) -> AbstractContextManager[Any]:
    """Makes what is traced inside compute in `precision` on a GPU or TPU, whose own default for float32 is less.

    cuDNN rounds the inputs of float32 convolutions to TF32 unless the precision is HIGHEST, an error of 3e-4 in place
    of 1e-6.
    """
    if jax.default_backend() == "cpu":
        return nullcontext()
    return jax.default_matmul_precision("highest" if precision in ("fp32", "fp64") else "default")


def unused_gpu() -> str | None:
    """What to tell the user of a machine with an NVIDIA device whose JAX computes on the CPU, unasked."""
    asked = jax.config.values["jax_platforms"]
    if asked or jax.default_backend() != "cpu" or not glob.glob("/dev/nvidia[0-9]*"):
        return None
    return "this machine has an NVIDIA device, but JAX computes on the CPU: pip install 'jax[cuda13]' to use it"
