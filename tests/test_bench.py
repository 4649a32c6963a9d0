"""The command line, as its users meet it: what it prints, what it returns, what it leaves behind."""

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import os
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from layouts import small_sets
from tiny import PLAIN, PROTOCOL

from jaxunlearn import benchmarks, progress
from jaxunlearn.commands.main import main
from jaxunlearn.devices import configuration
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.models import MODELS
from jaxunlearn.ops import native
from jaxunlearn.runs import preparation
from jaxunlearn.torch_style import baselines

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]

BENCH, FASHION = "tiny-digits-class0", "tiny-fmnist-class0"
TINY = dataclasses.replace(PROTOCOL, batch_size=64, pretrain_epochs=2, unlearn_epochs=2)


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder: (status, stdout, stderr)."""
    monkeypatch.setitem(benchmarks.BENCHMARKS, BENCH, TINY)
    monkeypatch.setitem(benchmarks.BENCHMARKS, FASHION, dataclasses.replace(TINY, dataset="fashion_mnist"))
    monkeypatch.setattr(progress, "LINE_SECONDS", (3600.0, 3600.0))  # however slow this machine is now
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, command="bench"):
        status = main([command, *arguments, "--cache-dir", "cache"])
        return status, *capsys.readouterr()

    return run


def write_idx(folder, images, labels):
    """FashionMNIST's four files: the same images for training and test."""
    folder.mkdir(exist_ok=True)
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())


@pytest.mark.usefixtures("cache_not_given")
def test_a_run_prints_a_table_and_leaves_records(bench, tmp_path):
    status, out, err = bench(
        "--bench", BENCH, "--method", "scrub", "retain_finetune", "--seeds", "1,3", "--devices", "1"
    )
    assert status == 0 and err == ""  # no progress where stderr is no terminal
    for text in ("pretrained", "scrub", "retain_finetune", "symmetric_score", "±"):
        assert text in out
    assert len(list((tmp_path / "runs" / BENCH).glob("*/seed[13].json"))) == 4
    assert any((tmp_path / "cache" / "xla").iterdir())  # the compilation cache is on


@pytest.mark.cpu
def test_json_prints_one_record_a_line_and_nothing_else(bench, tmp_path):
    status, out, _ = bench(
        "--bench", BENCH, "--seeds", "0-1", "--method", "retain_finetune", "--json", "--devices", "2"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [record["seed"] for record in records] == [0, 1]
    assert json.loads((tmp_path / "runs" / BENCH / "retain_finetune" / "seed0.json").read_text()) == records[0]


@small_sets
def test_a_benchmark_is_one_line(bench, tmp_path, monkeypatch):
    """VGG-16-BN on CIFAR-10: there is a row in `benchmarks.py` and nothing else. A tiny model trains in its place."""
    (tmp_path / "images").mkdir()
    labels, rng = np.arange(20, dtype=np.uint8)[:, None] % 10, np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (20, 32 * 32 * 3), np.uint8)
        (tmp_path / "images" / f"{name}.bin").write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    monkeypatch.setitem(MODELS, "vgg16bn", MODELS[PLAIN])
    name, few = "vgg16bn-cifar10-class0", ("--pretrain-epochs", "1", "--unlearn-epochs", "1", "--devices", "1")
    status, out, _ = bench("--bench", name, "--method", "retain_finetune", "--data-dir", "images", "--json", *few)
    record = json.loads(out)
    assert (status, record["bench"], record["status"]) == (0, name, "ok")
    assert (record["protocol"]["model"], record["protocol"]["dataset"]) == ("vgg16bn", "cifar10")


def test_a_rule_of_the_users_own_and_its_settings(bench, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n"
        "@loss_rule\n"
        "def rule(student, retain, forget, *, scale: float = 1.0):\n"
        "    return scale * cross_entropy(student(retain.images), retain.labels)\n"
    )
    status, out, _ = bench("--bench", BENCH, "--method", "mine.py", "--set", "mine.scale=2", "--json", "--devices", "1")
    record = json.loads(out)
    assert status == 0 and record["method"] == "mine" and record["hyperparameters"] == {"scale": 2.0}


def test_a_class_of_the_pytorch_harness_is_a_method(bench):
    file = Path(baselines.__file__).parent / "torch_scrub.py"
    arguments = ("--method", str(file), "--set", "torch_scrub.forget_epochs=1", "--seeds", "0-1", "--devices", "1")
    status, out, err = bench("--bench", BENCH, *arguments, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and err == ""
    assert [(r["method"], r["seed"], r["status"]) for r in records] == [("torch_scrub", s, "ok") for s in (0, 1)]
    assert records[0]["dataset"] == {"digest": "36142473ed47490e", "verified": True}
    assert records[0]["hyperparameters"] == {"temperature": 4.0, "gamma": 0.99, "alpha": 0.01, "forget_epochs": 1}


def test_protocol_fields_are_set_by_flag_or_by_set(bench):
    fields = (
        "--set",
        "protocol.unlearn_lr=0.01",
        "--set",
        "protocol.std=(1,1,1)",
        "--drop-last",
        "--unlearn-epochs",
        "1",
    )
    status, out, _ = bench("--bench", BENCH, "--method", "retain_finetune", "--json", "--devices", "1", *fields)
    protocol = json.loads(out)["protocol"]
    assert status == 0 and (protocol["unlearn_epochs"], protocol["drop_last"]) == (1, True)
    assert protocol["unlearn_lr"] == 0.01 and protocol["std"] == [1.0, 1.0, 1.0]


def test_list_names_benchmarks_and_methods(bench):
    status, out, _ = bench("--list")
    assert status == 0
    assert {"vgg16bn-cifar100-class0", "scrub", "retrain"} <= set(out.split())
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["scrub", "retain, forget images"] in lines and ["output_mask", "nothing (reference)"] in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "--bench"),
        ("--bench vgg16-cifar100-class0", "did you mean 'vgg16bn-cifar100-class0'"),
        (f"--bench {BENCH} --method scrubb", "did you mean 'scrub'"),
        (f"--bench {BENCH} --method absent.py", "no such rule file"),
        (f"--bench {BENCH} --method broken.py", "SyntaxError"),
        (f"--bench {BENCH} --method wrong.py", "must return an UnlearningRule"),
        (f"--bench {BENCH} --method loose.py", "does not keep the rule contract"),
        (
            f"--bench {BENCH} --method item.py",
            "Item.unlearn_step, line 3: .item(), float() and int() ask for the value",
        ),
        (f"--bench {BENCH} --method scrub scrub", "each method once"),
        (f"--bench {BENCH} --seeds 5-", "write 42, 0-7 or 1,5,9"),
        (f"--bench {BENCH} --coordinator localhost:1", "give all three"),
        (f"--bench {BENCH} --forget-class 10", "forget class 10 does not exist"),
        (f"--bench {BENCH} --forget-class -1", "forget class -1 does not exist"),
        (f"--bench {BENCH} --pretrain-epochs 0", "pretrain_epochs is 0"),
        (f"--bench {BENCH} --unlearn-epochs -3", "unlearn_epochs is -3"),
        (f"--bench {BENCH} --batch-size many", "invalid int value"),
        (f"--bench {BENCH} --train-limit 9", "train_limit is 9"),
        (f"--bench {BENCH} --batch-size 1000 --drop-last", "no batch"),
        (f"--bench {BENCH} --devices 99", "--devices 99"),
        (f"--bench {BENCH} --save-every -1", "--save-every -1"),
        (f"--bench {BENCH} --save-every nan", "--save-every nan"),
        (f"--bench {BENCH} --devices 0", "--devices 0"),
        (f"--bench {BENCH} --seeds 3-1", "--seeds 3-1"),
        (f"--bench {BENCH} --seeds 1,1", "--seeds 1,1"),
        (f"--bench {BENCH} --seeds x", "--seeds x"),
        (f"--bench {BENCH} --set scrub.heat=2", "no hyperparameter 'heat'"),
        (f"--bench {BENCH} --set scrub.temperature=hot", "expected a value like 4.0"),
        (f"--bench {BENCH} --set scrub.temperature=inf", "expected a value like 4.0"),
        (f"--bench {BENCH} --set scrub=2", "NAME.KEY=VALUE"),
        (f"--bench {BENCH} --method scrub --set bad_teacher.reset_bn=true", "not among the methods"),
        (f"--bench {BENCH} --set protocol.pretrain_lr=-1", "pretrain_lr is -1"),
        (f"--bench {BENCH} --set protocol.colour=1", "protocol.colour"),
        (f"--bench {BENCH} --set protocol.dataset=cifar10", "protocol.dataset"),
        (f"--bench {BENCH} --set protocol.mean=(1e400,0,0)", "expected a value like"),
        (f"--bench {BENCH} --seeds 0-99999999999", "--seeds 0-99999999999"),
        (f"--bench {BENCH} --method retrain --batch-size 100000 --drop-last", "no batch"),
        (f"--bench {BENCH} --train-limit 99999", "only 1433 training images"),
        (f"--bench {BENCH} --method endless.py", "must be a finite number"),
        (f"--bench {BENCH} --method starless.py", "write the loss as rule(student, retain, forget, *,"),
        (f"--bench {BENCH} --out file/runs", "cannot write"),
        (f"--bench {BENCH} --init-weights absent.npz", "absent.npz"),
        (f"--bench {BENCH} --init-weights file", "cannot read weights file file"),
        (f"--bench {BENCH} --init-weights text.safetensors", "cannot read weights file text.safetensors"),
        (f"--bench {BENCH} --export-weights file/weights", "cannot write to file/weights"),
        (f"--bench {BENCH} --no-such-flag", "--no-such-flag"),
        (f"--bench {FASHION} --data-dir empty", "no fashion_mnist in empty: "),
        (f"--bench {FASHION} --data-dir cut", "train-images-idx3-ubyte"),
        (f"--bench {FASHION} --data-dir labels", "labels"),
        (f"--bench {FASHION} --data-dir gzipped", "train-images-idx3-ubyte.gz"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(bench, tmp_path, arguments, said):
    rules = {
        "broken.py": "def rule(:\n",
        "wrong.py": "def rule(context):\n    return 3\n",
        "loose.py": "from jaxunlearn.methods.rule import loss_rule\n@loss_rule\ndef rule(student, retain, forget):\n"
        "    return student(retain.images)\n",
        "item.py": "class Item:\n    def unlearn_step(self, model, retain, forget, optimizer, step, epoch):\n"
        "        return {'loss': model(retain[0]).sum().item()}\n",
        "endless.py": "def rule(context, *, cap: float = float('inf')):\n    pass\n",
        "starless.py": "from jaxunlearn.methods.rule import loss_rule\n@loss_rule\n"
        "def rule(student, retain, forget, weight=1.0):\n    return 0.0\n",
        "file": "not a folder, not weights",
        "text.safetensors": "not weights",
    }
    for name, text in rules.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    images, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8)
    write_idx(tmp_path / "cut", images, labels % 10)
    whole = (tmp_path / "cut" / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "cut" / "train-images-idx3-ubyte").write_bytes(whole[:-100])
    write_idx(tmp_path / "labels", images, labels)  # up to 19
    write_idx(tmp_path / "gzipped", images, labels % 10)
    (tmp_path / "gzipped" / "train-images-idx3-ubyte").unlink()
    (tmp_path / "gzipped" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-30])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    status, out, err = bench(*arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    ignored = {path for path in tmp_path.rglob("*") if "__pycache__" in path.parts}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path not in ignored} == before


def test_compiled_kernels_are_kept_in_the_cache_folder(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(native, "keep_in", seen.append)
    assert bench("--bench", BENCH, "--devices", "99")[0] == 2
    assert seen == [Path("cache")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_cache_without_locks_is_one_line_before_anything_is_done(bench, tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    status, out, err = bench("--bench", BENCH, "--method", "scrub", "--devices", "1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and err.endswith("without locks: choose another --cache-dir\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_too_little_memory_is_one_line(bench, monkeypatch, platform):
    def prepare(request, reporter):
        assert request.deterministic
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\nmore")

    monkeypatch.setenv("XLA_FLAGS", configuration.DETERMINISTIC)
    monkeypatch.delenv(configuration.FRACTION, raising=False)
    monkeypatch.setattr(preparation, "prepare", prepare)
    status, out, err = bench("--bench", BENCH, "--deterministic")
    more = ", or another fraction of the device for JAX (XLA_PYTHON_CLIENT_MEM_FRACTION, now .75)"
    remedy = f"take fewer seeds together or a smaller batch{more if platform == 'gpu' else ''}"
    assert (status, out, err) == (2, "", f"error: out of device memory: {remedy}\n")


def test_exported_weights_are_where_a_run_starts(bench, tmp_path):
    arguments = ("--bench", BENCH, "--method", "retain_finetune", "--json", "--devices", "1")
    status, out, err = bench(*arguments, "--export-weights", "weights")
    weights = tmp_path / "weights" / BENCH / "retain_finetune" / "seed42.safetensors"
    assert (status, err) == (0, "") and weights.is_file()
    exported = json.loads(out)
    status, out, _ = bench(*arguments, "--init-weights", str(weights))
    again = json.loads(out)
    assert status == 0 and {name: again["before"][name] for name in METRICS} == {
        name: exported[name] for name in METRICS
    }
    assert again["protocol"]["init_weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_better_record_is_kept_with_a_warning(bench, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n"
        "@loss_rule\n"
        "def rule(student, retain, forget):\n"
        "    return cross_entropy(student(retain.images), retain.labels)\n"
    )
    arguments = ("--bench", BENCH, "--method", "mine.py", "--devices", "1", "--export-weights", "weights")
    assert bench(*arguments)[0] == 0
    record = (tmp_path / "runs" / BENCH / "mine" / "seed42.json").read_text()
    weights = (tmp_path / "weights" / BENCH / "mine" / "seed42.safetensors").read_bytes()
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "    * float('nan')\n")
    text = (tmp_path / "mine.py").read_text().replace("labels)\n    *", "labels) *")
    (tmp_path / "mine.py").write_text(text)
    status, out, err = bench(*arguments)
    assert status == 0 and "diverged" in out
    assert err.startswith("warning: ") and "--force" in err
    assert (tmp_path / "runs" / BENCH / "mine" / "seed42.json").read_text() == record
    assert (tmp_path / "weights" / BENCH / "mine" / "seed42.safetensors").read_bytes() == weights
