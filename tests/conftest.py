"""Four CPU devices for every test, and the tiny models for those that ask for them.

On a machine with an accelerator too: `JAX_PLATFORMS=cuda python -m pytest` runs what does not assume a CPU there.
"""

import atexit
import contextlib
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Three quarters of the tests' time is compiling (308 s of two files against 87 with all programs at hand). Each program
# is compiled once for all tests and the processes that they start; where JAX has been given a cache, for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxunlearn-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = ""  # its path is part of every key before jax 0.11
# A program that is read while another process writes it, or was killed at that, is compiled once more.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

import jax
import pytest
from tiny import PLAIN, TINY, Tiny

from jaxunlearn.devices.configuration import cache_configured
from jaxunlearn.files import default_cache
from jaxunlearn.models import MODELS
from jaxunlearn.ops import native

# XLA has as many threads as devices or cores; where all of them wait for each other inside a collective, a step that
# needs one more never ends (seen with four devices on one core).
os.environ.setdefault("NPROC", "16")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 4)


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "cpu":
        native.library()  # from the user's cache folder, or the first test would compile it into its own
        return
    jax.config.update("jax_default_matmul_precision", "highest")  # float32, as the comparisons mean it
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="assumes a CPU"))


@contextlib.contextmanager
def _compiling_quickly():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_compilation():
    """Compiles in two thirds or a third of the time, for a test of what is computed and not of how fast."""
    with _compiling_quickly():
        yield


@pytest.fixture(scope="module")
def tiny_models():
    """Adds the tiny models to the package's own for the tests of one file, and compiles as quickly."""
    MODELS.update({TINY: Tiny, PLAIN: lambda **options: Tiny(dropout=0.0, **options)})
    with _compiling_quickly():
        yield
    del MODELS[TINY], MODELS[PLAIN]


@pytest.fixture
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=["compiled", "XLA's"])
def form(request, monkeypatch):
    """Runs a test with the compiled kernels, then without."""
    if request.param == "XLA's":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def cache_not_given():
    """JAX as it is where nobody has given it a cache, for one test."""
    with cache_configured(
        jax_compilation_cache_dir=None,
        jax_persistent_cache_min_compile_time_secs=1.0,
        jax_persistent_cache_enable_xla_caches="xla_gpu_per_fusion_autotune_cache_dir",
    ):
        yield


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """For processes that shall compile the kernels: the first compiler copies those of the tests themselves."""
    kept = default_cache() / "kernels" / f"{native.library()}.so"
    compilers = native._compilers()
    if not kept.exists() or "/" in compilers[0][0]:
        return  # then they are compiled
    folder = tmp_path / "compilers"
    folder.mkdir()
    script = folder / compilers[0][0]
    script.write_text(f'#!/bin/sh\nfor out; do :; done\ncp "{kept}" "$out"\n')  # the last word is where it goes
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
