"""The compiled kernels: when they are used, what they do with denormals and threads, and where they cannot be compiled.

That their values and gradients are right is in test_fused.py and test_finishing.py.
"""

import errno
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from jaxunlearn.ops import native
from jaxunlearn.ops.fused import convolve

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

COMPILED = native.library() is not None
needs_compiler = pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")

# Prints whether the kernels are there, and all bits of every kernel, or of XLA's forms, in a loss and its gradients.
SCRIPT = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from jaxunlearn.models.layers import BatchNorm, Conv, conv_norm
from jaxunlearn.ops import native
from jaxunlearn.ops.fused import pooled, written
import flax.linen as nn
class Network(nn.Module):
    dtype: type
    @nn.compact
    def __call__(self, x):
        for k, (features, size, stride, groups) in enumerate(
            [(16, 3, 1, 1), (16, 3, 1, 1), (64, 1, 1, 1), (64, 3, 1, 64), (32, 3, 2, 1)]
        ):
            conv = Conv(features, size, stride, groups, self.dtype, name=f"conv{k}")
            x = conv_norm(conv, BatchNorm(self.dtype, name=f"norm{k}"), x, True, relu=True)
        x = written(x)
        x = conv_norm(Conv(32, dtype=self.dtype), BatchNorm(self.dtype), x, True, relu=True, residual=x)
        return pooled(conv_norm(Conv(8, dtype=self.dtype), BatchNorm(self.dtype), x, True)).astype(jnp.float32)
bits = []
for dtype in (jnp.float32, jnp.bfloat16):
    network, x = Network(dtype), jnp.asarray(np.random.default_rng(0).normal(size=(37, 8, 8, 3)), jnp.float32)
    draw = lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape), jnp.float32)
    variables = jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0), x))
    loss = lambda variables: jnp.sin(network.apply(variables, x, mutable=["batch_stats"])[0]).sum()
    bits += [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(variables))]
print(native.library() is not None, hashlib.sha256(b"".join(bits)).hexdigest())
"""


def start(script=SCRIPT, **environment):
    """(whether there are kernels, digest, stderr) of the script in a process of its own."""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    found, digest = result.stdout.split()
    return found == "True", digest, result.stderr


x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))


@needs_compiler
def test_kernels_serve_float32_and_bfloat16_on_one_device():
    assert convolve(x, kernel, 1, 1) is not None
    assert convolve(x.astype(jnp.bfloat16), kernel, 1, 1).y.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert convolve(x.astype(jnp.float64), kernel.astype(jnp.float64), 1, 1) is None
        y, pull = jax.vjp(lambda x: convolve(x, kernel, 1, 1), x)
        assert {leaf.dtype for leaf in jax.tree.leaves((y, pull(y)))} == {jnp.dtype(jnp.float32)}


@needs_compiler
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(("seeds", "data", "used"), [(2, 1, True), (1, 2, False)])
def test_a_batch_that_devices_share_takes_xla_which_can_divide_its_own_forms_only(seeds, data, used):
    mesh = jax.make_mesh((seeds, data), ("seed", "data"), (AxisType.Auto,) * 2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert (convolve(x, kernel, 1, 1) is not None) == used


@needs_compiler
def test_denormals_are_flushed_as_xla_flushes_them():
    tiny = 1e-20
    assert jnp.max(convolve(tiny * x, tiny * kernel, 1, 1).y) == jnp.max(jax.jit(jnp.multiply)(tiny * x, tiny)) == 0


@needs_compiler
def test_bits_do_not_depend_on_the_number_of_threads():
    one, three = start(NPROC="1"), start(NPROC="3")
    assert one[0] and one == three


@pytest.fixture(scope="module")
def sound():
    return start()


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_compiled_anew(tmp_path, sound, quick_compiler, content):
    library = tmp_path / "jaxunlearn" / "kernels" / f"{native.library()}.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    assert start(XDG_CACHE_HOME=str(tmp_path)) == sound and sound[0]
    assert library.read_bytes()[:4] == b"\x7fELF"


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, sound, quick_compiler):
    (tmp_path / "file").touch()
    *same, err = start(XDG_CACHE_HOME=str(tmp_path / "file"))
    reason = f"{tmp_path}/file/jaxunlearn/kernels: Not a directory"
    assert err == f"the CPU kernels are compiled at every start ({reason}): choose another XDG_CACHE_HOME\n"
    assert (*same, "") == sound


def test_without_a_compiler_xla_does_all_and_a_line_says_so(tmp_path):
    found, _, err = start(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), CXX="")
    assert not found
    assert err == "slower than it could be: the CPU kernels need a C++20 compiler, such as g++ (none found)\n"


def write_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return [str(path)]


def test_what_the_compiler_says_is_passed_on(tmp_path):
    write_compiler(tmp_path / "c++", "echo 'In file included from here:\nx.h:1: error: too old' >&2\nexit 1")
    found, _, err = start(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), CXX="")
    assert not found and err.count("\n") == 1 and err.endswith("(c++: x.h:1: error: too old)\n")


def test_compilers_are_tried_until_one_works(tmp_path):
    old = write_compiler(tmp_path / "old", """echo "old: error: unrecognized option '-std=c++20'" >&2; exit 1""")
    broken = write_compiler(tmp_path / "broken", "exit 1")
    absent = [str(tmp_path / "absent")]
    # The last word of a command is where the result goes.
    good = write_compiler(tmp_path / "good", 'for out; do :; done; echo "$*" > "$out"')
    native._compile([absent, old, broken, [*good, "-m64"], old], [], tmp_path / "out")
    assert (tmp_path / "out").read_text().startswith("-m64 -O3 ")
    reasons = f"{absent[0]}: No such file or directory; {old[0]}: too old for C\\+\\+20; {broken[0]}: it failed"
    with pytest.raises(OSError, match=rf"need a C\+\+20 compiler, such as g\+\+ \({reasons}\)$"):
        native._compile([absent, old, broken], [], tmp_path / "out")


@pytest.mark.parametrize("said", ["No space left on device", "Disk quota exceeded"])
def test_a_full_folder_for_temporary_files_is_no_fault_of_the_compiler(tmp_path, said):
    full = write_compiler(tmp_path / "c++", f"echo 'as: error: x.o: {said}' >&2; exit 1")
    with pytest.raises(OSError, match=rf"cannot be compiled \(.*: {said}\): choose another TMPDIR$"):
        native._compile([full], [], tmp_path / "out")


def test_compilers_are_the_users_own_then_what_there_is(tmp_path, monkeypatch):
    for name in ("g++-9", "g++-12", "clang++-16", "g++", "clang++", "g++-mine"):
        write_compiler(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    there = [[name] for name in ("g++", "clang++", "clang++-16", "g++-12", "g++-9")]
    assert native._compilers() == there
    monkeypatch.setenv("CXX", "ccache 'my g++'")
    assert native._compilers() == [["ccache", "my g++"], *there]
    monkeypatch.setenv("CXX", "'g++")
    assert native._compilers()[0] == ["'g++"]
    monkeypatch.setenv("CXX", "g++-9")
    assert native._compilers() == [["g++-9"], *(command for command in there if command != ["g++-9"])]


@pytest.fixture
def noexec(monkeypatch, tmp_path):
    """No compiler is called; a library is loaded as its path, but from no folder below those in the list."""
    folders = [tmp_path]

    def load(path):
        if any(path.startswith(str(folder)) for folder in folders):
            raise OSError(f"{path}: failed to map segment from shared object")
        return path

    def mounted(path):
        return SimpleNamespace(f_flag=os.ST_NOEXEC)

    monkeypatch.setattr(native, "_compile", lambda compilers, sources, out: out.write_bytes(b"a library"))
    monkeypatch.setattr(native, "_cache_dir", tmp_path)
    monkeypatch.setattr(native.ctypes, "CDLL", load)
    monkeypatch.setattr(os, "statvfs", mounted)
    return folders


def test_a_cache_mounted_noexec_costs_only_time(noexec, tmp_path, capsys):
    loaded = native._compile_and_load([], [], tmp_path / "kernels" / "x.so")
    assert loaded.endswith("kernels.so") and not loaded.startswith(str(tmp_path))
    reason = f"{tmp_path}/kernels: mounted noexec"
    assert capsys.readouterr().err == (
        f"the CPU kernels are compiled at every start ({reason}): choose another --cache-dir\n"
    )


def test_of_those_that_start_at_once_one_compiles(tmp_path, monkeypatch):
    compiled = []

    def compile_slowly(compilers, sources, out):
        compiled.append(out)
        time.sleep(0.2)
        out.write_bytes(b"a library")

    def load(file):
        if not os.path.exists(file):
            raise OSError("not there")
        return file

    def start(number):
        with native._turn(path):
            return native._compile_and_load([], [], path)

    monkeypatch.setattr(native, "_compile", compile_slowly)
    monkeypatch.setattr(native.ctypes, "CDLL", load)
    path = tmp_path / "kernels" / "x.so"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))) == [str(path)] * 4
    assert len(compiled) == 1


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_full_cache_costs_only_time(noexec, tmp_path, monkeypatch, capsys, number):
    def full(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    assert native._compile_and_load([], [], tmp_path / "kernels" / "x.so").endswith("kernels.so")
    assert f"({tmp_path}/kernels: {os.strerror(number)}): choose another --cache-dir" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "kernels")


def test_where_nothing_may_be_executed_xla_does_all_and_a_line_says_so(noexec, tmp_path, capsys):
    noexec.append(tempfile.gettempdir())
    assert native.library.__wrapped__() is None
    reasons = f"{tmp_path}/kernels: mounted noexec; {tempfile.gettempdir()}: mounted noexec"
    assert capsys.readouterr().err == (
        f"slower than it could be: the CPU kernels cannot be loaded ({reasons}): choose another --cache-dir\n"
    )


def test_the_library_is_kept_below_the_cache_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "_cache_dir", None)
    seen = []

    def compile_and_load(compilers, sources, path):
        seen.append(path)
        raise OSError("enough")

    monkeypatch.setattr(native, "_compile_and_load", compile_and_load)
    native.keep_in(tmp_path)
    native.library.__wrapped__()
    assert seen[0].parent == tmp_path / "kernels"
