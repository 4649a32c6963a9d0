"""The package's own CPU kernels (`kernels/*.cc`): compiled when first needed, and called from XLA's programs.

They serve float32 and bfloat16 where a program runs on one CPU device. Elsewhere, and where there is no C++ compiler,
the layers take the forms that XLA has.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import Array

from jaxunlearn.errors import UserError, printable
from jaxunlearn.files import acquire, default_cache, make_lock, write_atomically
from jaxunlearn.ops.batching import on_cpu

SOURCES = Path(__file__).parent / "kernels"
# Contracted to fused multiply-adds, but without -ffast-math: a NaN must stay one for a diverged seed to be seen.
OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-w")
_PAIRS = ("convolution", "pointwise", "depthwise", "finish", "finish_pool")  # in float32 and in bfloat16
KERNELS = (
    *(f"{kind}_{way}{dtype}" for kind in _PAIRS for way in ("forward", "backward") for dtype in ("", "_bf16")),
    "winograd_forward",
    "winograd_backward",
    "convolution_kernel_gradient",
)
TILE_KERNELS = ("tiles_forward_bf16", "tiles_backward_bf16")  # of processors with AMX alone


def usable(*arrays: Array) -> bool:
    """Whether the kernels take these arrays, all float32, in the program that is traced now."""
    return takes(*arrays) and arrays[0].dtype == jnp.float32


def takes(image: Array, *parameters: Array) -> bool:
    """Whether the kernels take an image, float32 or bfloat16, and float32 parameters, in the program traced now."""
    if not on_cpu() or image.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    if any(array.dtype != jnp.float32 for array in parameters) or 0 in map(jnp.size, (image, *parameters)):
        return False
    # XLA does not divide a foreign call among devices: each would do all of it.
    alone = jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1
    return alone and library() is not None


def has_tiles() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in tiles, and this process may use them."""
    return library() is not None and _has_tiles


_has_tiles = False


def call(
    kernel: str,
    *arrays: Array,
    like: Callable[..., Any],
    shape: tuple[int, ...] = (),
    into: dict[int, int] | None = None,
    **options: Any,
) -> Any:
    """`like(*arrays)` by one of the kernels, once `usable` has said yes.

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


def keep_in(cache_dir: Path) -> None:
    """Sets the folder below which the library is kept, of a process that has not used it yet."""
    global _cache_dir
    _cache_dir = cache_dir


_cache_dir: Path | None = None  # None: the user's cache folder


@functools.cache
def library() -> str | None:
    """Loads and registers the library, first compiling it if need be; returns what its kernels' names begin with.

    None, and a line on stderr, where it cannot be compiled or loaded. A line too where it cannot be kept.
    """
    sources = sorted(SOURCES.iterdir())
    compilers = _compilers()
    content = b"".join(source.read_bytes() for source in sources)
    built_for = "\n".join((*OPTIONS, jaxlib.__version__, str(compilers), _processor()))
    name = "jaxunlearn_" + hashlib.sha256(content + built_for.encode()).hexdigest()[:16]
    path = (_cache_dir or default_cache()).absolute() / "kernels" / f"{name}.so"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # not there, damaged, or where nothing may be executed
        try:
            if sys.stderr.isatty():
                print("compiling the CPU kernels, once", file=sys.stderr)
            with _turn(path):
                loaded = _compile_and_load(compilers, [source for source in sources if source.suffix == ".cc"], path)
        except OSError as error:
            print(printable(f"slower than it could be: {error}"), file=sys.stderr)
            return None
    global _has_tiles
    _has_tiles = hasattr(loaded, "tiles_allowed") and bool(loaded.tiles_allowed())
    for kernel in (*KERNELS, *(TILE_KERNELS if _has_tiles else ())):
        jax.ffi.register_ffi_target(f"{name}_{kernel}", jax.ffi.pycapsule(getattr(loaded, kernel)), platform="cpu")
    return name


def _compilers() -> list[list[str]]:
    """The commands that may be C++ compilers, in the order in which they are tried: `$CXX`, then whatever is found."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    versions = {
        path.name for folder in folders for kind in ("g++", "clang++") for path in folder.glob(f"{kind}-[0-9]*")
    }
    newest_first = sorted(versions, key=lambda name: -int(re.split(r"\D+", name)[1]))
    found = [[name] for name in ("c++", "g++", "clang++", *newest_first) if shutil.which(name)]
    chosen = os.environ.get("CXX", "")
    try:
        own = shlex.split(chosen)
    except ValueError:  # a quote without its other, which will be said to be no compiler
        own = [chosen]
    return [own, *(command for command in found if command != own)] if own else found


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits while another process compiles to `path`: started at once, all would compile, each slowing the others.

    Where files cannot be locked, or one takes longer than any compiler that works, all do compile.
    """
    lock = make_lock(path.with_name(f".{path.stem}.lock"))
    with suppress(UserError):
        acquire(lock, 300, "")
    try:
        yield
    finally:
        lock.release()


def _compile_and_load(compilers: Sequence[Sequence[str]], sources: Sequence[Path], path: Path) -> ctypes.CDLL:
    """Loads from `path`, or where it cannot be from there, with a line on stderr, from a file that is gone afterwards.

    Raises OSError, whose text says why, where no compiler works or nothing can be loaded.
    """
    with suppress(OSError):
        return ctypes.CDLL(str(path))  # compiled by another process, while this one waited for its turn
    remedy = f"choose another {'--cache-dir' if _cache_dir else 'XDG_CACHE_HOME'}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.so"
        _compile(compilers, sources, out)
        try:
            write_atomically(path, out.read_bytes())
            return _load(path)
        except OSError as error:
            reason = f"{path.parent}: {error.strerror or error}"
        try:
            loaded = _load(out)
        except OSError as error:
            reason += f"; {tempfile.gettempdir()}: {error.strerror or error}"
            raise OSError(f"the CPU kernels cannot be loaded ({reason}): {remedy}") from error
    print(printable(f"the CPU kernels are compiled at every start ({reason}): {remedy}"), file=sys.stderr)
    return loaded


def _compile(compilers: Sequence[Sequence[str]], sources: Sequence[Path], out: Path) -> None:
    """Makes `out` with the first compiler that can. Raises OSError, whose text says why, where none can."""
    failures = []
    for compiler in compilers:
        try:
            done = _build(compiler, sources, out)
        except OSError as error:
            failures.append(f"{compiler[0]}: {error.strerror}")
            continue
        if done.returncode == 0:
            return
        if full := re.search("No space left on device|Disk quota exceeded", done.stderr):
            raise OSError(
                f"the CPU kernels cannot be compiled ({tempfile.gettempdir()}: {full[0]}): choose another TMPDIR"
            )
        failures.append(f"{compiler[0]}: {_complaint(done.stderr)}")
    reasons = "; ".join(failures) or "none found"
    raise OSError(f"the CPU kernels need a C++20 compiler, such as g++ ({reasons})")


def _build(compiler: Sequence[str], sources: Sequence[Path], out: Path) -> subprocess.CompletedProcess[str]:
    """Compiles all sources at once and links them; returns the first step that failed, or the last."""

    # Another processor than this one's may be asked for: CXX="g++ -march=x86-64-v3".
    chosen = any(word.startswith("-march=") for word in compiler)
    options = [option for option in OPTIONS if not (chosen and option.startswith("-march="))]

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*compiler, *options, *map(str, arguments)]
        english = os.environ | {"LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=english)

    # Two cores: 17 s, 34 by one command.
    objects = [out.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(
            pool.map(lambda *of: run("-I", jax.ffi.include_dir(), "-c", of[0], "-o", of[1]), sources, objects)
        )
    return next((done for done in compiled if done.returncode), None) or run("-shared", *objects, "-o", out)


def _complaint(said: str) -> str:
    """What of a compiler's words is worth repeating."""
    if "-std=c++20" in said:
        return "too old for C++20"
    lines = said.splitlines() or ["it failed"]
    return next((line for line in lines if "error" in line), lines[0])


def _load(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if os.statvfs(file.parent).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise OSError(error.errno, "mounted noexec") from error
        raise


def _processor() -> str:
    """What `-march=native` depends on: the cache folder may be one for several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
