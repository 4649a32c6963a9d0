"""The package's own CPU kernels (`kernels/*.cc`): compiled when first needed, and called from XLA's programs.

They serve float32 where a program runs on one CPU device. Elsewhere, and where there is no C++ compiler, the layers
take the forms that XLA has.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import Array

from jaxunlearn.errors import printable
from jaxunlearn.files import default_cache, write_atomically
from jaxunlearn.ops.batching import on_cpu

SOURCES = Path(__file__).parent / "kernels"
# Contracted to fused multiply-adds, but without -ffast-math: a NaN must stay one for a diverged seed to be seen.
OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-w")
KERNELS = (
    "convolve",
    "convolve_spread",
    "convolution_kernel_gradient",
    "depthwise",
    "depthwise_kernel_gradient",
    "normalise",
    "normalise_gradient",
)


def usable(*arrays: Array) -> bool:
    """Whether the kernels take these arrays in the program that is traced now."""
    if not on_cpu() or any(array.dtype != jnp.float32 or array.size == 0 for array in arrays):
        return False
    # XLA does not divide a foreign call among devices: each would do all of it.
    alone = jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1
    return alone and library() is not None


def call(
    kernel: str,
    *arrays: Array,
    like: Callable[..., Any],
    shape: tuple[int, ...] = (),
    into: dict[int, int] | None = None,
    **options: Any,
) -> Any:
    """`like(*arrays)` by one of `KERNELS`, once `usable` has said yes.

    Args:
      like: the same in JAX: gives the results' shapes, and the derivative.
      shape: what tells apart calls whose results differ although arguments and options are alike.
      into: the results that may take the place of an argument that is not needed afterwards, {argument: result}.
      options: numpy scalars, of the types that the kernel reads.
    """
    key = (kernel, shape, *options.values(), *map(jax.typeof, arrays))
    if key not in _RESULTS:
        _RESULTS[key] = jax.eval_shape(like, *arrays)
    run = jax.ffi.ffi_call(f"{library()}_{kernel}", _RESULTS[key], vmap_method="sequential", input_output_aliases=into)
    called = jax.custom_jvp(lambda *arrays: run(*arrays, **options))
    called.defjvp(lambda primals, tangents: jax.jvp(like, primals, tangents))
    return called(*arrays)


# By call: tracing `like` anew for every layer of every program took 40% of all tracing, 4 s of MobileNetV2's 10.
_RESULTS: dict[Any, Any] = {}


@functools.cache
def library() -> str | None:
    """Loads and registers the library, first compiling it if need be; returns what its kernels' names begin with.

    None, and a line on stderr, where it cannot be compiled.
    """
    sources = sorted(SOURCES.iterdir())
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    content = b"".join(source.read_bytes() for source in sources)
    built_for = "\n".join((*OPTIONS, jaxlib.__version__, str(compiler), _processor()))
    name = "jaxunlearn_" + hashlib.sha256(content + built_for.encode()).hexdigest()[:16]
    path = default_cache() / "kernels" / f"{name}.so"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        try:
            loaded = _compile_and_load(compiler, [source for source in sources if source.suffix == ".cc"], path)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).splitlines()
            reason = printable(next((line for line in lines if "error" in line), lines[0] if lines else "it failed"))
            needs = f"the CPU kernels need a C++20 compiler, such as g++ ({reason})"
            print(f"slower than it could be: {needs}", file=sys.stderr)
            return None
    for kernel in KERNELS:
        jax.ffi.register_ffi_target(f"{name}_{kernel}", jax.ffi.pycapsule(getattr(loaded, kernel)), platform="cpu")
    return name


def _compile_and_load(compiler: str | None, sources: list[Path], path: Path) -> ctypes.CDLL:
    """Loads from `path`, or where nothing can be written there, from a file that is gone afterwards."""
    if compiler is None:
        raise OSError("none found")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.so"
        command = [compiler, *OPTIONS, "-I", jax.ffi.include_dir(), *map(str, sources), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        try:
            write_atomically(path, out.read_bytes())
        except OSError:
            return ctypes.CDLL(str(out))
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """What `-march=native` depends on: the cache folder may be one for several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
