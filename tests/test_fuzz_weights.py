"""Damaged and hostile weight files: the model's variables or one line, no code, bounded memory."""

import functools
import io
import json
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from fuzzing import SIZES, Trap, damaged, fuzzed, inside, outcome, programs
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLASSES, PROTOCOL

from jaxunlearn.errors import UserError
from jaxunlearn.models import weight_files
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import from_state_dict, load_weights, to_state_dict
from jaxunlearn.models.weight_files import read_weights

pytestmark = [
    pytest.mark.usefixtures("tiny_models"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:weights of other names"),  # a damaged name is another
]
__all__ = ["inside"]  # a fixture


@functools.cache
def variables():
    network = make_network(PROTOCOL, CLASSES)
    params, batch_stats = network.initialise(jax.random.key(0))
    return {"params": params, "batch_stats": batch_stats}


@functools.cache
def whole(suffix):
    """A good file."""
    arrays, buffer = to_state_dict(variables()), io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, **arrays)
    elif suffix == ".safetensors":
        return safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    else:
        torch = pytest.importorskip("torch")
        state = {key: torch.tensor(value) for key, value in arrays.items()}
        torch.save(state, buffer, _use_new_zipfile_serialization=suffix == ".pt")  # ".th": as before 1.6
    return buffer.getvalue()


ENDINGS = st.sampled_from(["", ".npz", ".safetensors", ".pt", ".pth.tar", ".ckpt", ".bin", ".html", ".\U0001f40d"])


def check(path, content):
    """Loads a file of this content; whatever it holds then is finite and fits."""
    path.write_bytes(content)
    found = outcome(load_weights, path, variables())
    if found is not None:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
            lambda x: (x.shape, x.dtype), variables()
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    return found


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_good_file_is_read(suffix, inside):
    assert check(inside / f"weights{suffix}", whole(suffix)) is not None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".th"])
@fuzzed(80)
@given(draw=st.data(), ending=ENDINGS)
def test_damaged_files(suffix, draw, ending, inside):
    check(inside / f"weights{ending}", draw.draw(damaged(whole(suffix))))


STARTS = st.sampled_from(
    [b"", b"PK\x03\x04", weight_files.TORCH_NUMBER, bytes(8) + b"{", b"\x80\x02", b"<!doctype html>"]
)
STARTS |= st.sampled_from(
    [b"\x89HDF\r\n", b"version https://git-lfs", b"\x93NUMPY", b"\x1f\x8b\x08", b"\xef\xbb\xbf <html"]
)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".th"])
@fuzzed(60)
@given(start=STARTS, at=st.integers(0, 600), rest=st.binary(max_size=40), ending=ENDINGS)
def test_files_that_begin_as_another_kind(suffix, start, at, rest, ending, inside):
    check(inside / f"weights{ending}", start + rest + whole(suffix)[at:])


KEYS = st.sampled_from(["conv.weight", "bn.bias", "fc.bias", "module.", "", "a\n\x1b[2J", "x" * 3000, "__metadata__"])
NUMBER = st.sampled_from([0, 1, 4, 24, -1, 0.5, 1e400, "4", None, True, *SIZES])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "F8_E4M3", "F4", "C64", "U8", "", None, 3]),
        "shape": st.lists(NUMBER, max_size=3) | NUMBER,
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3) | NUMBER,
        "format": st.just("pt"),
    },
)
HEADERS = st.dictionaries(KEYS, ENTRY, max_size=3).map(json.dumps) | st.sampled_from(
    ["[" * 9999, '{"a":' * 9999, '{"a":1,"a":2}', "{}", "", "null", '{"\\ud800":{}}', "{" + " " * 9999 + "}"]
)


@fuzzed(200)
@given(header=HEADERS, length=st.none() | st.sampled_from(SIZES), body=st.sampled_from([b"", bytes(4), bytes(24)]))
def test_safetensors_of_any_header(header, length, body, inside):
    size = struct.pack("<Q", len(header) if length is None else length)
    check(inside / "weights.safetensors", size + header.encode() + body)


def npy(header, body=b"", version=b"\x01\x00", length=None):
    length = len(header) if length is None else length
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", length) + header.encode() + body


MEMBERS = st.builds(
    npy,
    st.builds(
        "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
        st.sampled_from(["'<f4'", "'|O'", "'<f2'", "'V0'", "'<U9'", "'<f16'", "[('a','|O')]", "'>f4'", "3"]),
        st.sampled_from(["True", "False", "None"]),
        st.sampled_from(["()", "(1,)", "(0,)", "(-1,)", f"({2**40},)", f"({2**62},4)", "(1.0,)", "[1]", "(" * 400]),
    )
    | st.sampled_from(["", "{}", "(" * 9000, "-" * 9000 + "1", "open('sprung', 'w')", " " * 60_000]),
    st.sampled_from([b"", bytes(4), pickle.dumps(Trap())]),
    st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]),
    st.sampled_from([None, None, None, 0, 0xFFFF]),
)  # fmt: skip


@fuzzed(150)
@given(
    members=st.lists(
        st.tuples(st.sampled_from(["conv.weight.npy", "conv.weight", "../sprung", ".npy", "\xd8.npy"]), MEMBERS),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)  # fmt: skip
def test_npz_of_any_members(members, method, inside):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, member in members:
            archive.writestr(name, member)
    check(inside / "weights.npz", buffer.getvalue())


LAYER_KEYS = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "", "", "module.", "0."]),
    st.sampled_from(["conv", "bn", "fc", "conv_1", "bn_1", "head", "normalize", "\n"]),
    st.sampled_from(
        ["weight", "bias", "running_mean", "running_var", "weight_orig", "weight_mask", "mean", "std", "n_averaged"]
    ),
)


@fuzzed(300)
@given(
    wanted=st.lists(st.sampled_from([0, 1, 2, 3]), min_size=0, max_size=12),
    others=st.dictionaries(LAYER_KEYS, st.sampled_from([(), (1,), (3,), (6,), (6, 3, 3, 3), (3, 6), (0,)]), max_size=6),
    dtype=st.sampled_from(["f4", "f2", "i8", "i1", "?", "c8", "U1", "O"]),
    renamed=st.booleans(),
    ordered=st.booleans(),
)
def test_state_dicts_of_any_names(wanted, others, dtype, renamed, ordered, inside):
    state = {}
    for number, (key, value) in enumerate(to_state_dict(variables()).items()):
        if number not in wanted:
            state[key.replace("conv", "conv_0").replace("bn", "bn_0") if renamed else key] = value
    order = sorted(state, key=lambda key: ("conv" not in key, "bn" not in key))
    state = {key: state[key] for key in order} | {key: np.zeros(shape, dtype) for key, shape in others.items()}
    found = outcome(from_state_dict, state, variables(), ordered)
    assert found is None or jax.tree.structure(found) == jax.tree.structure(variables())


def pt(program, records=()):
    """PyTorch's format with a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("data.pkl", program), ("version", b"3\n"), ("byteorder", b"little"), *records):
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


OLD = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


@fuzzed(250)
@given(program=programs, zipped=st.booleans(), ending=ENDINGS)
def test_pytorch_files_of_any_opcodes(program, zipped, ending, inside):
    pytest.importorskip("torch")
    check(inside / f"weights{ending}", pt(program, [("data/0", bytes(64))]) if zipped else OLD + program)


# ---- what failed once ------------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(UserError) as caught:
        read_weights(path)
    return str(caught.value)


def test_an_archive_may_not_unpack_to_more_than_weights_have(inside):
    with zipfile.ZipFile(inside / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**24},), }}"
        for key in "abc":
            archive.writestr(f"{key}.npy", npy(header, bytes(2**26)))
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files, "MAX_BYTES", 2**27)
        assert "holds more than 134217728 bytes" in refused(inside / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_file_may_not_be_larger_than_weights_are(suffix, inside, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_BYTES", 100)
    (inside / f"weights{suffix}").write_bytes(bytes(101))
    assert "holds more than 100 bytes" in refused(inside / f"weights{suffix}")


def test_pytorchs_archives_and_repeated_elements_are_bounded_too(inside, monkeypatch):
    torch = pytest.importorskip("torch")
    (inside / "bomb.pt").write_bytes(pt(pickle.dumps({}), [("data/0", bytes(2**20))]))
    torch.save({"a": torch.zeros(1, dtype=torch.bfloat16).expand(2**30)}, inside / "view.pt")
    monkeypatch.setattr(weight_files, "MAX_BYTES", 2**20)
    assert "holds more than" in refused(inside / "bomb.pt")
    assert "holds more than" in refused(inside / "view.pt")  # two gigabytes of one element


def test_a_bias_that_repeats_one_element_is_not_written_out():
    small = {key: np.broadcast_to(np.float32(0), 2**40) for key in ("conv.bias", "bn.running_mean")}
    assert "wrong shape" in refused_state(small)


def test_values_that_are_not_finite_are_refused_without_a_warning():
    state = to_state_dict(variables())
    for bias, mean in ((np.inf, np.inf), (np.nan, 0), (1e300, -1e300)):
        spoiled = {"conv.bias": np.full(6, bias), "bn.running_mean": np.full(6, mean)}
        assert "must be finite: bn.running_mean" in refused_state(state | spoiled)


def refused_state(spoiled):
    with pytest.raises(UserError) as caught:
        from_state_dict(to_state_dict(variables()) | spoiled, variables())
    return str(caught.value)


def test_an_old_pytorch_reads_nothing(inside, monkeypatch):
    version = pytest.importorskip("torch.torch_version").TorchVersion
    (inside / "weights.pt").write_bytes(whole(".pt"))
    for old in ("2.5.1", "2.9.1+cpu"):
        fake = types.SimpleNamespace(__version__=version(old), load=lambda *_, **__: pytest.fail("loaded"))
        monkeypatch.setitem(sys.modules, "torch", fake)
        assert f"PyTorch {old} can be made to run code by a file: update it to 2.10" in refused(inside / "weights.pt")


@pytest.mark.parametrize("name", ["x" * 300 + ".npz", "a\0b.npz", "a\nb.npz", "\udcff.npz"])
def test_names_that_no_file_can_have(name, inside):
    message = refused(inside / name)
    assert message.startswith("no weights file") and message.isprintable()


def test_what_never_ends_is_no_file(inside):
    (inside / "zero.safetensors").symlink_to("/dev/zero")
    assert "no weights file" in refused(inside / "zero.safetensors")
