"""The compiled kernels: when they are used, what they do with NaN and threads, and where they cannot be compiled.

That their values and gradients are right is in test_layers.py, which runs every layer in both forms.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxunlearn.ops import native
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.normalization import batch_norm

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

COMPILED = native.library() is not None
needs_compiler = pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")

# Prints whether the kernels are there, and all bits of a convolution, a depthwise one, a BatchNorm and their gradients.
SCRIPT = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from jaxunlearn.ops import native
from jaxunlearn.ops.convolution import conv2d
from jaxunlearn.ops.normalization import batch_norm
random = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
def loss(x, kernel, taps, scale):
    y, mean, var = batch_norm(conv2d(conv2d(x, kernel), taps, 1, 64), scale, scale, None, scale, True)
    return jnp.sin(y).sum() + mean.sum() + var.sum()
leaves = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(
    leaves(random(37, 16, 16, 16), random(3, 3, 16, 64), random(3, 3, 1, 64), random(64)))]
print(native.library() is not None, hashlib.sha256(b"".join(bits)).hexdigest())
"""


def start(script=SCRIPT, **environment):
    """(whether there are kernels, digest, stderr) of the script in a process of its own."""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    found, digest = result.stdout.split()
    return found == "True", digest, result.stderr


def uses_kernels(function, *arrays):
    return "ffi_call" in str(jax.make_jaxpr(function)(*arrays))


x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))


@needs_compiler
def test_kernels_serve_float32_on_one_device():
    assert uses_kernels(conv2d, x, kernel)
    assert not uses_kernels(conv2d, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        assert not uses_kernels(conv2d, x.astype(jnp.float64), kernel.astype(jnp.float64))
        y, pull = jax.vjp(
            lambda x: batch_norm(x, jnp.ones(16, jnp.float32), kernel[0, 0, 0], None, kernel[0, 0, 0], True), x
        )
        assert {leaf.dtype for leaf in jax.tree.leaves((y, pull(y)))} == {jnp.dtype(jnp.float32)}


@needs_compiler
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(("seeds", "data", "used"), [(2, 1, True), (1, 2, False)])
def test_a_batch_that_devices_share_takes_xla_which_can_divide_its_own_forms_only(seeds, data, used):
    mesh = jax.make_mesh((seeds, data), ("seed", "data"), (AxisType.Auto,) * 2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert uses_kernels(conv2d, x, kernel) == used


@needs_compiler
def test_nan_stays_nan():
    bad = x.at[1, 4, 4, 3].set(jnp.nan)
    y = conv2d(bad, kernel)
    assert jnp.isnan(y[1, 3:6, 3:6]).all() and jnp.isfinite(y[0]).all()
    y, mean, var = batch_norm(bad, jnp.ones(16), jnp.zeros(16), None, jnp.zeros(16), True)
    channel = np.arange(16) == 3
    for values in (y, mean, var):
        np.testing.assert_array_equal(jnp.isnan(values).all(tuple(range(values.ndim - 1))), channel)


@needs_compiler
def test_denormals_are_flushed_as_xla_flushes_them():
    tiny = 1e-20
    assert jnp.max(conv2d(tiny * x, tiny * kernel)) == jnp.max(jax.jit(jnp.multiply)(tiny * x, tiny)) == 0


@needs_compiler
def test_bits_do_not_depend_on_the_number_of_threads():
    one, three = start(NPROC="1"), start(NPROC="3")
    assert one[0] and one == three


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_compiled_anew(tmp_path, content):
    sound = start(XDG_CACHE_HOME=str(tmp_path))
    (library,) = tmp_path.rglob("*.so")
    whole = library.read_bytes()
    library.write_bytes(content)
    assert start(XDG_CACHE_HOME=str(tmp_path)) == sound and sound[0]
    assert library.read_bytes()[:4] == whole[:4] == b"\x7fELF"


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").touch()
    assert start(XDG_CACHE_HOME=str(tmp_path / "file")) == start()


def test_without_a_compiler_xla_does_all_and_a_line_says_so(tmp_path):
    found, _, err = start(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert not found
    assert err == "slower than it could be: the CPU kernels need a C++20 compiler, such as g++ (none found)\n"


def test_what_the_compiler_says_is_passed_on(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'In file included from here:\nx.h:1: error: too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    found, _, err = start(XDG_CACHE_HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert not found and err.count("\n") == 1 and err.endswith("(x.h:1: error: too old)\n")
