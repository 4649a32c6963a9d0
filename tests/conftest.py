"""Four CPU devices for every test, and the tiny models for those that ask for them.

On a machine with an accelerator too: `JAX_PLATFORMS=cuda python -m pytest` runs what does not assume a CPU there.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny import PLAIN, TINY, Tiny

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


@pytest.fixture(scope="module")
def tiny_models():
    """Adds the tiny models to the package's own for the tests of one file, and compiles in a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    MODELS.update({TINY: Tiny, PLAIN: lambda **options: Tiny(dropout=0.0, **options)})
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del MODELS[TINY], MODELS[PLAIN]


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def compile_once(kept_programs):
    """Keeps what tests compile, as if JAX had been given a cache: else each run, of any file, would do it anew."""
    settings = {"jax_compilation_cache_dir": str(kept_programs)}
    settings["jax_persistent_cache_min_compile_time_secs"] = 0.0
    before = {name: jax.config.values[name] for name in settings}
    _update(settings)
    yield
    _update(before)


@pytest.fixture
def cache_not_given():
    """JAX as it is where nobody has given it a cache, for one test."""
    before = {"jax_compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"]}
    _update({"jax_compilation_cache_dir": None})
    yield
    _update(before)


def _update(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it keeps the folder that it was first used with


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the processes that tests start keep their compiled programs."""
    return tmp_path_factory.mktemp("xla")
