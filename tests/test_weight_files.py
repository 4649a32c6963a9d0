"""Files of weights: every format, every bad file in one line, none that runs code."""

import pickle
import sys

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
    assert "\n" not in message and str(path) in message
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


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".SafeTensors", ".pt", ".pth", ".th"])
def test_every_format(tmp_path, suffix):
    path = tmp_path / f"weights{suffix.lower()}"
    write(path)
    assert_read(path.rename(tmp_path / f"weights{suffix}"))


def test_the_format_before_pytorch_1_6(tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value) for key, value in ARRAYS.items()}
    torch.save({"state_dict": state}, tmp_path / "old.th", _use_new_zipfile_serialization=False)
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
    others = [other for other in (".npz", ".safetensors") if other != suffix]
    for other in others:
        write(tmp_path / f"other{other}", arrays)
    contents = [b"", b"hello", good[: len(good) // 2], good[:-1], good[:9]]
    contents += [(tmp_path / f"other{other}").read_bytes() for other in others]
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
    (tmp_path / "weights.bin").touch()
    assert ".npz, .safetensors, .pt, .pth, .th" in refused(tmp_path / "weights.bin")
    assert "no weights file" in refused(tmp_path / "absent.npz")


def test_pytorch_files_that_hold_something_else_are_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.npz"
    torch.save({"a": torch.zeros(3)}, path)  # a zip file too
    assert "is no array" in refused(path)
    for content in (torch.zeros(3), {}, {"epoch": 3}, {"state_dict": {"a": [1, 2]}}):
        torch.save(content, tmp_path / "weights.pt")
        assert "save model.state_dict()" in refused(tmp_path / "weights.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "weights.pt")  # a whole module
    refused(tmp_path / "weights.pt")


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
    (tmp_path / "weights.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "`parity`" in refused(tmp_path / "weights.pt")
