"""Whole runs on scikit-learn's digits with a tiny model: records, the cache, going on after an interruption."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny import PROTOCOL

from jaxunlearn import benchmarks, pretrained
from jaxunlearn.benchmarks import PRETRAIN_FIELDS
from jaxunlearn.data.readers import ImageSet
from jaxunlearn.methods import get_method
from jaxunlearn.metrics import METRICS
from jaxunlearn.models import torch_weights
from jaxunlearn.models.network import make_network
from jaxunlearn.progress import Reporter
from jaxunlearn.runs import Request, Run, limited
from jaxunlearn.training import Pretraining

pytestmark = pytest.mark.usefixtures("tiny_models")

BENCH = "tiny-digits-class0"
QUIET = Reporter(quiet=True)
DIGITS = dataclasses.replace(PROTOCOL, batch_size=64, train_limit=300, pretrain_epochs=3, unlearn_epochs=2)


@pytest.fixture(autouse=True)
def tiny_bench(monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, BENCH, DIGITS)


def request_of(folder, *, method="retain_finetune", settings=None, seeds=(42,), protocol=DIGITS, **options):
    methods = [get_method(name, settings) for name in method.split()]
    options = {"devices": 1} | options
    return Request(BENCH, protocol, methods, seeds, folder / "runs", folder / "cache", **options)


def results(request):
    return [record for record, _ in Run(request, QUIET).results()]


def numbers(record):
    """What two equal runs must agree on to the bit."""
    return [record[name] for name in METRICS], record["before"]


def test_a_run_leaves_whole_records(tmp_path):
    records = results(request_of(tmp_path, method="negative_gradient scrub", seeds=(1, 2)))
    assert [(r["method"], r["seed"]) for r in records] == [
        (method, seed) for method in ("negative_gradient", "scrub") for seed in (1, 2)
    ]
    for record in records:
        path = tmp_path / "runs" / BENCH / record["method"] / f"seed{record['seed']}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(record))
        assert record["status"] == "ok" and record["unlearn_steps"] == 2 * 1  # 30 forget images: one batch an epoch
        assert all(0 <= record[name] <= 1 and 0 <= record["before"][name] <= 1 for name in METRICS)
        assert set(record["protocol"]) == {field.name for field in dataclasses.fields(DIGITS)}
        assert set(record["timing"]) == {"data_s", "compile_s", "pretrain_s", "unlearn_s", "evaluate_s"}
        assert record["throughput"]["unlearn_steps_per_s"] > 0 and record["throughput"]["pretrain_images_per_s"] > 0
        assert (
            record["environment"]["device_count"] == 1 and record["environment"]["versions"]["jax"] == jax.__version__
        )
    assert records[0]["before"] == records[2]["before"] != records[1]["before"]


def test_a_second_run_does_not_train_and_agrees_to_the_bit(tmp_path, monkeypatch):
    first = results(request_of(tmp_path))
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained again"))
    assert list(map(numbers, results(request_of(tmp_path)))) == list(map(numbers, first))


def test_an_interrupted_pretraining_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    undisturbed = results(request_of(tmp_path / "a", seeds=(3, 4)))
    saves, save = [], pretrained.save

    def save_then_stop(entry, saved):
        save(entry, saved)
        saves.append(saved.epoch)
        if len(saves) == 3:  # after epoch 2 of the first seed, before that of the second
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        results(request_of(tmp_path / "b", seeds=(3, 4)))
    epochs = []
    monkeypatch.setattr(pretrained, "save", lambda entry, saved: (epochs.append(saved.epoch), save(entry, saved)))
    resumed = results(request_of(tmp_path / "b", seeds=(3, 4)))
    assert sorted(epochs) == [2, 3, 3]
    assert list(map(numbers, resumed)) == list(map(numbers, undisturbed))


def test_other_settings_get_a_folder_of_their_own(tmp_path):
    folders = set()
    for options in (
        {},
        {"protocol": dataclasses.replace(DIGITS, unlearn_lr=1e-2)},
        {"protocol": dataclasses.replace(DIGITS, unlearn_lr=1e-4)},
    ):
        request = request_of(tmp_path, **options)
        folders.add(request.record_path(request.methods[0], 42).parent.name)
    request = request_of(tmp_path, method="scrub", settings={"temperature": "2"})
    folders.add(request.record_path(request.methods[0], 42).parent.name)
    assert "retain_finetune" in folders and len(folders) == 4
    assert sorted(len(name.rpartition("-")[2]) for name in folders if "-" in name) == [8, 8, 8]


def test_retrain_never_sees_the_forgotten_class(tmp_path):
    protocol = dataclasses.replace(DIGITS, pretrain_epochs=12, pretrain_lr=0.3, train_limit=None)
    (record,) = results(request_of(tmp_path, method="retrain", protocol=protocol))
    assert record["forget_acc"] == 0 < record["before"]["forget_acc"]
    assert record["unlearn_steps"] == 12 * math.ceil(1291 / 64)  # 1,433 training images, 142 of them zeros
    assert len(list((tmp_path / "cache" / "pretrained").iterdir())) == 2


def test_given_weights_replace_pretraining(tmp_path, monkeypatch):
    params, batch_stats = make_network(DIGITS, 10).initialise(jax.random.key(5))
    np.savez(tmp_path / "w.npz", **torch_weights.to_state_dict({"params": params, "batch_stats": batch_stats}))
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained"))
    first, second = results(request_of(tmp_path, seeds=(1, 2), init_weights=tmp_path / "w.npz"))
    assert first["before"] == second["before"] and first["timing"]["pretrain_s"] == 0
    assert first["throughput"]["pretrain_images_per_s"] is None
    assert not (tmp_path / "cache" / "pretrained").exists()


def test_exported_weights_give_the_model_that_was_exported(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    exported = results(request_of(tmp_path, method="scrub retrain", seeds=(1, 2), export_weights=folder))
    records = {path.relative_to(tmp_path / "runs").with_suffix("") for path in tmp_path.glob("runs/*/*/*.json")}
    files = {path.relative_to(folder).with_suffix("") for path in folder.glob("*/*/*.safetensors")}
    assert len(files) == 4 and files == records
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained"))
    for record in exported:
        weights = folder / BENCH / record["method"] / f"seed{record['seed']}.safetensors"
        protocol = dataclasses.replace(DIGITS, init_weights="its hash", unlearn_epochs=1)
        (again,) = results(request_of(tmp_path, seeds=(7,), protocol=protocol, init_weights=weights))
        assert again["before"] == {name: record[name] for name in METRICS}


def test_a_diverged_run_says_so(tmp_path):
    rule = tmp_path / "explode.py"
    rule.write_text(
        "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n"
        "@loss_rule\n"
        "def rule(student, retain, forget, *, scale: float = 1.0):\n"
        "    return scale * cross_entropy(student(retain.images), retain.labels) * scale\n"
    )
    weights = tmp_path / "weights"
    run = Run(request_of(tmp_path, method=str(rule), settings={"scale": "1e30"}, export_weights=weights), QUIET)
    ((wild, warning),) = run.results()
    assert warning is not None and "diverged" in warning and not weights.exists()
    assert wild["status"] == "diverged" and all(wild[name] is None for name in METRICS)
    assert wild["before"]["retain_acc"] is not None


def test_train_limit_takes_equally_many_of_each_class_from_the_front():
    labels = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2], np.int32)
    kept = limited(ImageSet(np.arange(9)[:, None, None, None].astype(np.uint8), labels), 3, 7)
    assert kept.images.ravel().tolist() == [0, 1, 2, 3, 4, 5] and kept.labels.tolist() == [0, 1, 2, 2, 1, 0]


def test_pretrain_fields_exist():
    assert set(PRETRAIN_FIELDS) <= {field.name for field in dataclasses.fields(DIGITS)}
