"""Files of weights: every format, every bad file in one line, none that runs code."""

import argparse
import io
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import PurePosixPath

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxunlearn.errors import UserError
from jaxunlearn.models.weight_files import read_weights, write_safetensors

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "bn.weight": np.array([0.5, 2], np.float16),
    "bn.num_batches_tracked": np.array(7, np.int64),
}


def refused(path):
    with pytest.raises(UserError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    assert not any(theirs in message for theirs in ("weights_only", "torch.load", "Error", "allow_pickle"))
    return message


def assert_read(path, arrays=ARRAYS):
    read = read_weights(path)
    assert read.keys() == arrays.keys()
    for key, value in arrays.items():
        assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(read[key], value)


def write(path, arrays=ARRAYS):
    """A good file of the kind that the suffix names."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        write_safetensors(path, arrays)
    else:
        torch = pytest.importorskip("torch")
        torch.save({key: torch.tensor(value) for key, value in arrays.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.th", "w.pth.tar", "w.ckpt", "w.model", "w.bin", "w"])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, suffix, name):
    write(tmp_path / f"as_written{suffix}")
    assert_read((tmp_path / f"as_written{suffix}").rename(tmp_path / name))


def test_the_format_before_pytorch_1_6(tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value) for key, value in ARRAYS.items()}
    beside = {"state_dict": state, "best": np.float64(0.9)}
    torch.save(beside, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    assert_read(tmp_path / "old.th")


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net"])
def test_checkpoints_that_hold_more(tmp_path, wrapper):
    torch = pytest.importorskip("torch")
    state = {key: torch.nn.Parameter(torch.tensor(value), value.dtype.kind == "f") for key, value in ARRAYS.items()}
    torch.save({wrapper: state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "checkpoint.th")
    assert_read(tmp_path / "checkpoint.th")


def test_bfloat16(tmp_path):
    values = np.array([1.5, -3e38], np.float32)
    half = values.astype(jnp.bfloat16)
    expected = {"a": half.astype(np.float32)}
    (tmp_path / "a.safetensors").write_bytes(safetensors.numpy.save({"a": half}))
    assert_read(tmp_path / "a.safetensors", expected)
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor(values).bfloat16()}, tmp_path / "a.pt")
    assert_read(tmp_path / "a.pt", expected)


def test_what_is_written_is_whole_and_pytorchs(tmp_path):
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    write_safetensors(path, {"a": np.arange(6.0).reshape(2, 3).T})  # not contiguous
    write_safetensors(path, {"a": np.arange(6.0).reshape(2, 3).T, "b": np.zeros(())})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    assert load_file(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    arrays = {"conv.weight": np.arange(5000, dtype=np.float32), "b": np.ones(3, np.float32)}
    write(tmp_path / f"good{suffix}", arrays)
    good = (tmp_path / f"good{suffix}").read_bytes()
    contents = [b"", b"hello", good[: len(good) // 2], good[:-1], good[:9]]
    for number, content in enumerate(contents):
        (tmp_path / f"bad{number}{suffix}").write_bytes(content)
        assert "cannot read weights file" in refused(tmp_path / f"bad{number}{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(tmp_path / f"folder{suffix}")


def test_files_that_hold_something_else_are_one_line(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "single array" in refused(tmp_path / "array.npz")
    (tmp_path / "float8.safetensors").write_bytes(safetensors.numpy.save({"a": np.zeros(3, jnp.float8_e4m3fn)}))
    assert "F8_E4M3" in refused(tmp_path / "float8.safetensors")
    (tmp_path / "int8.safetensors").write_bytes(safetensors.numpy.save({"a": np.ones((2, 3), np.int8)}))
    assert_read(tmp_path / "int8.safetensors", {"a": np.ones((2, 3), np.int8)})  # of a quantized model, or a mask
    np.savez(tmp_path / "bfloat16.npz", a=np.zeros(3, jnp.bfloat16))
    assert "'a' in it has a dtype that NumPy does not know: save it as float32" in refused(tmp_path / "bfloat16.npz")
    np.savez(tmp_path / "weights.npz", model=np.array({"a": 1}, dtype=object))
    assert "'model' in it is an object" in refused(tmp_path / "weights.npz")
    assert "no weights file" in refused(tmp_path / "absent.npz")


def zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"Not Found", "it is a text"),
        (b"\x1f\x8b\x08" + bytes(99), "unpack it"),
        (b"weights/".ljust(257, b"\0") + b"ustar\x0000", "unpack it"),
        (zipped("weights/", "weights/resnet20.pth"), "unpack it"),
        (zipped("net/constants.pkl", "net/data.pkl", "net/code/__torch__.py"), "TorchScript"),
        (pickle.dumps({"a": [1, 2]}), "it is a pickle"),
        (zipped("a.npy")[:-30], "only part of a file"),
        (bytes(99), "it is no file of weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:4]),
)
def test_what_a_file_is_instead_is_named(tmp_path, content, said):
    (tmp_path / "weights.pth").write_bytes(content)
    assert said in refused(tmp_path / "weights.pth")


def test_pytorch_files_that_hold_something_else_are_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    path, module = tmp_path / "weights.pt", torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    for content in (torch.zeros(3), {}, {"epoch": 3}, {"state_dict": {"a": [1, 2]}}, {"loss": torch.tensor(0.5)}):
        torch.save(content, path)
        assert "save model.state_dict()" in refused(path)
    for content in (module, {"net": module, "acc": 93.1}):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            message = refused(path)
            assert "whole pickled module" in message and "save model.state_dict()" in message
    for new in (True, False):
        torch.save({"a": torch.zeros(3)}, path, pickle_protocol=4, _use_new_zipfile_serialization=new)
        assert "pickle_protocol=4" in refused(path)
    torch.save({"student": {"a": torch.zeros(3)}, "teacher": {"a": torch.zeros(3)}}, path)
    assert "several state_dicts, student, teacher" in refused(path)
    with warnings.catch_warnings(action="ignore"):  # PyTorch is about to give them up
        weight = torch.quantize_per_tensor(torch.zeros(2, 3, 1, 1), 0.1, 0, torch.qint8)
    for content in ({"conv.weight": weight}, {"a": torch.zeros(3), "fc._packed_params._packed_params": (weight, None)}):
        torch.save(content, path)
        assert "quantized model" in refused(path)
    for tensor, said in (
        (torch.eye(3).to_sparse(), "'a' in it is sparse: save its to_dense()"),
        (torch.zeros(3, device="meta"), "'a' in it has no values"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "'a' in it has the dtype torch.float8_e4m3fn: save its float()"),
    ):
        torch.save({"a": tensor}, path)
        assert said in refused(path)


class Config(dict):
    """Of a user's: as a dict, with attributes."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.frozen = True


class Slotted:
    __slots__ = ("lr",)

    def __init__(self):
        self.lr = 0.1


@pytest.mark.parametrize(
    "beside",
    [
        np.float64(0.93),
        np.float32(0.93),
        np.arange(3),
        argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
        PurePosixPath("/data"),
        OrderedDict(a=1),
        defaultdict(list, {"losses": [1.0]}),
        deque([1, 2], 3),
        {1, 2},
        Config(),
        Slotted(),
        print,
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stands_beside_the_weights_is_left_closed(tmp_path, beside):
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value) for key, value in ARRAYS.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"weights": state, "optimizer": optimizer, "beside": beside}, tmp_path / "checkpoint.pth.tar")
    assert_read(tmp_path / "checkpoint.pth.tar")
    torch.save(state | {"epoch": 3, "beside": beside}, tmp_path / "flat.pt")
    assert_read(tmp_path / "flat.pt")
    assert not [known for known in torch.serialization.get_safe_globals() if "StandIn" in str(known)]


class Trap:
    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_no_file_runs_code(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"pickled{suffix}", tmp_path / f"inside{suffix}"]
    paths[0].write_bytes(pickle.dumps({"a": Trap()}))
    if suffix == ".npz":
        np.savez(paths[1], a=np.array([Trap()], dtype=object))
    elif suffix == ".pt":
        pytest.importorskip("torch").save({"a": Trap()}, paths[1])
    for path in paths:
        refused(path)
    assert not (tmp_path / "sprung").exists()


def test_without_pytorch_its_files_name_the_extra(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(zipped("weights/data.pkl"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "`parity`" in refused(tmp_path / "weights.pt")
