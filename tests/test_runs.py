"""Whole runs on scikit-learn's digits with a tiny model: records, the cache, going on after an interruption."""

import contextlib
import dataclasses
import errno
import json
import math
import os

import jax
import numpy as np
import pytest
from orbax.checkpoint import Checkpointer
from safetensors.numpy import load_file
from tiny import PROTOCOL

from jaxunlearn import benchmarks
from jaxunlearn.data.datasets import find, limited
from jaxunlearn.errors import UserError
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.progress import Reporter
from jaxunlearn.registry import get_method
from jaxunlearn.results import records as records_module
from jaxunlearn.results import schema
from jaxunlearn.runs import running
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.runs.request import Request
from jaxunlearn.training import resuming
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.saving import Saving
from jaxunlearn.training.unlearning import Unlearning

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]

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
    return [record for record, _ in running.results(prepare(request, QUIET))]


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
        schema.check(record)
        assert record["companions"]["against_retrain"] is None and record["companions"]["full"] is None
        assert [len(record["curves"][phase]["loss"]) for phase in ("pretrain", "unlearn")] == [3, 2]
        assert record["throughput"]["unlearn_steps_per_s"] > 0 and record["throughput"]["pretrain_images_per_s"] > 0
        assert (
            record["environment"]["device_count"] == 1 and record["environment"]["versions"]["jax"] == jax.__version__
        )
    assert records[0]["before"] == records[2]["before"] != records[1]["before"]


def test_what_is_to_be_done_is_counted_in_images(tmp_path):
    asked = {"method": "retrain retain_finetune output_mask", "seeds": (1, 2), "unlearn_seeds": 2}
    run = prepare(request_of(tmp_path, **asked), QUIET)
    answers = run.evaluator.steps * 500 / 3
    work = [2 * (3 * 270 + answers), 4 * (2 * (64 + 30) + answers), 2 * answers]  # 30 of 300 images are of the class
    assert [run.work(group) for group in run.groups] == work


def test_a_second_run_does_not_train_and_agrees_to_the_bit(tmp_path, monkeypatch):
    first = results(request_of(tmp_path))
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained again"))
    assert list(map(numbers, results(request_of(tmp_path)))) == list(map(numbers, first))


def stop_after(monkeypatch, steps):
    """Asks the run to stop once so many steps (None: any) are dispatched; returns a list that grows with them."""
    dispatched, due = [], Saving.due

    def counted(saving):
        dispatched.append(saving)
        return due(saving)

    @contextlib.contextmanager
    def deferred():
        yield lambda: len(dispatched) == steps

    monkeypatch.setattr(Saving, "due", counted)
    monkeypatch.setattr(resuming, "deferred", deferred)
    return dispatched


STEPPED = dataclasses.replace(DIGITS, epoch_length="retain")  # 300 images make 5 steps, the retained ones 5 of them


@pytest.mark.cpu
@pytest.mark.parametrize("at", [1, 7, 15, 17, 25], ids=["first", "middle", "pretrained", "unlearning", "last"])
def test_a_run_that_stops_anywhere_goes_on_from_there_and_ends_the_same(tmp_path, monkeypatch, at):
    options = {"seeds": (3, 4), "protocol": STEPPED, "method": "retain_finetune"}
    curves, curves_of = [], resuming._curves
    monkeypatch.setattr(resuming, "_curves", lambda *args: curves.append(curves_of(*args)) or curves[-1])
    undisturbed = results(request_of(tmp_path / "a", **options))
    stop_after(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        results(request_of(tmp_path / "b", **options))
    assert not list(tmp_path.glob("b/runs/**/*.json"))
    steps = stop_after(monkeypatch, None)
    resumed = results(request_of(tmp_path / "b", **options))
    assert len(steps) == 3 * 5 + 2 * 5 - at  # none twice
    assert list(map(numbers, resumed)) == list(map(numbers, undisturbed))
    assert curves[-4:] == curves[:4]  # two phases of two seeds
    for curve, epochs in zip(curves[:4], (3, 3, 2, 2), strict=True):
        assert curve.keys() == {"loss", "accuracy"} and {len(means) for means in curve.values()} == {epochs}
        assert all(0 < mean < 5 for means in curve.values() for mean in means)


@pytest.mark.cpu
def test_what_began_on_another_device_names_both(tmp_path, monkeypatch):
    save = Checkpointer.save

    def elsewhere(self, *arguments, custom_metadata, **options):
        save(self, *arguments, custom_metadata=custom_metadata | {"devices": ["a card"]}, **options)

    with monkeypatch.context() as other, pytest.raises(KeyboardInterrupt):
        other.setattr(Checkpointer, "save", elsewhere)
        stop_after(other, 7)
        results(request_of(tmp_path, protocol=STEPPED))
    (record,) = results(request_of(tmp_path, protocol=STEPPED))
    assert record["environment"]["trained_on"] == {"pretrain": ["a card", "cpu"], "unlearn": ["cpu"]}


def test_a_rule_that_takes_no_step_changes_the_model_once(tmp_path, monkeypatch):
    rule = tmp_path / "half.py"
    rule.write_text(
        "import functools, jax\n"
        "from jaxunlearn.methods.rule import UnlearningRule, init_state\n"
        "def rule(context):\n"
        "    def prepare(params, state, retain_set, forget_set):\n"
        "        return jax.tree.map(lambda x: x / 2, params), state\n"
        "    return UnlearningRule(functools.partial(init_state, context), None, prepare)\n"
    )
    request = request_of(tmp_path, method=str(rule), seeds=(1, 2))
    interrupted = running.results(prepare(request, QUIET))
    first, _ = next(interrupted)
    interrupted.close()
    assert (first["status"], first["unlearn_steps"]) == ("ok", 0)
    assert first["throughput"]["unlearn_steps_per_s"] is None
    assert first["timing"]["prepare_s"] > first["timing"]["unlearn_s"]
    assert first["retain_acc"] != first["before"]["retain_acc"]
    monkeypatch.setattr(Unlearning, "_prepare", lambda *_: pytest.fail("prepared again"))
    again = results(request)
    assert numbers(again[0]) == numbers(first)
    assert not list(tmp_path.glob("cache/unlearning/*"))


def test_a_disk_that_is_full_ends_no_run(tmp_path, monkeypatch):
    undisturbed = results(request_of(tmp_path / "a", protocol=STEPPED))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", full)
        with pytest.warns(UserWarning, match=r"a checkpoint was not written \(OSError: .*No space left"):
            records = results(request_of(tmp_path / "b", protocol=STEPPED, save_every=0.0))
    assert list(map(numbers, records)) == list(map(numbers, undisturbed))
    assert not list(tmp_path.glob("b/cache/*/*/epoch*"))
    assert list(map(numbers, results(request_of(tmp_path / "b", protocol=STEPPED)))) == list(map(numbers, undisturbed))


def test_a_record_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(records_module, "write_atomically", full)
        with pytest.raises(UserError, match=r"cannot write the results .*No space left.*: put that right and run"):
            results(request_of(tmp_path, protocol=STEPPED))
    steps = stop_after(monkeypatch, None)
    assert results(request_of(tmp_path, protocol=STEPPED))[0]["status"] == "ok" and not steps


@pytest.mark.cpu
def test_methods_that_are_done_are_not_redone_after_an_interruption(tmp_path, monkeypatch):
    request = request_of(tmp_path, method="retain_finetune negative_gradient", protocol=STEPPED)
    stop_after(monkeypatch, 3 * 5 + 2 * 5 + 1)
    with pytest.raises(KeyboardInterrupt):
        results(request)
    steps = stop_after(monkeypatch, None)
    assert [record["method"] for record in results(request)] == ["retain_finetune", "negative_gradient"]
    assert len(steps) == 2 * 5 - 1
    assert not list(tmp_path.glob("cache/unlearning/*"))


@pytest.mark.cpu
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, monkeypatch):
    protocol = dataclasses.replace(STEPPED, precision="fp64")
    monkeypatch.setitem(benchmarks.CHOICES, "precision", ("fp32", "fp64"))
    with jax.enable_x64(True):
        for name, first, second in (("a", 1, 1), ("b", 2, 1), ("c", 1, 2)):
            options = {"protocol": protocol, "export_weights": tmp_path / name / "weights"}
            stop_after(monkeypatch, 8)
            with pytest.raises(KeyboardInterrupt):
                results(request_of(tmp_path / name, devices=first, **options))
            stop_after(monkeypatch, None)
            results(request_of(tmp_path / name, devices=second, **options))
    models = [load_file(next(tmp_path.glob(f"{name}/weights/**/*.safetensors"))) for name in "abc"]
    for other in models[1:]:
        for name, value in models[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-9, atol=1e-9)


def test_a_run_may_hold_a_rule_several_times(tmp_path):
    variants = [get_method("scrub", {"temperature": text}) for text in ("4", "2")]
    request = dataclasses.replace(request_of(tmp_path, seeds=(1, 2)), methods=variants, once=True)
    run = prepare(request, QUIET)
    assert [group.title for group in run.groups] == ["scrub 1/2", "scrub 2/2"]
    kept = []
    for record, _ in running.results(run):
        kept.append((record["hyperparameters"]["temperature"], record["seed"], numbers(record)))
        unfinished = [path.name for path in tmp_path.glob("cache/unlearning/*")]
        assert len(unfinished) == 2  # those of the variant that is being written; what is done is gone
    assert [one[:2] for one in kept] == [(4.0, 1), (4.0, 2), (2.0, 1), (2.0, 2)]
    assert not list(tmp_path.glob("cache/unlearning/*")) and not run.unlearnings
    alone = results(request_of(tmp_path / "alone", method="scrub", settings={"temperature": "2"}, seeds=(1, 2)))
    assert [one[2] for one in kept[2:]] == list(map(numbers, alone)) != [one[2] for one in kept[:2]]
    folders = [request.record_path(method, 1).parent for method in variants]
    assert folders[0] != folders[1] and all((folder / "seed2.json").is_file() for folder in folders)


@pytest.mark.cpu
def test_variants_that_are_unlearned_together_go_on_together(tmp_path, monkeypatch):
    given, start = [], Unlearning.start
    monkeypatch.setattr(Unlearning, "start", lambda *args, **own: given.append(own["numbers"]) or start(*args, **own))
    variants = [get_method("negative_gradient", {"forget_weight": text}) for text in ("0.5", "2")]
    found = []
    for name, at in (("a", None), ("b", 17)):
        request = request_of(tmp_path / name, protocol=STEPPED, seeds=(3, 4), together=2)
        request = dataclasses.replace(request, methods=variants)
        stop_after(monkeypatch, at)
        with pytest.raises(KeyboardInterrupt) if at else contextlib.nullcontext():
            found.append(results(request))
        if at:
            steps = stop_after(monkeypatch, None)
            found.append(results(request))
            assert len(steps) == 3 * 5 + 2 * 5 - at  # all four at once
    assert given == [{"forget_weight": [0.5, 0.5, 2.0, 2.0]}] * 2
    assert [(one["hyperparameters"]["forget_weight"], one["seed"]) for one in found[0]] == [
        (weight, seed) for weight in (0.5, 2.0) for seed in (3, 4)
    ]
    assert list(map(numbers, found[0])) == list(map(numbers, found[1]))
    assert len({str(numbers(one)) for one in found[0]}) == 4


def test_variants_of_a_rule_that_looks_at_its_numbers_run_one_after_the_other(tmp_path):
    rule = tmp_path / "looks.py"
    rule.write_text(
        "from jaxunlearn.methods.retain_finetune import rule as inner\n"
        "def rule(context, *, weight: float = 1.0):\n"
        "    return inner(context) if weight > 0 else inner(context)._replace(passes=())\n"
    )
    for name, titles in ((str(rule), ["looks 1/2", "looks 2/2"]), ("zeroed_logit", ["zeroed_logit"])):
        first = get_method(name)
        (key,) = first.defaults
        request = request_of(tmp_path, together=2)
        variants = [first, first._replace(hyperparameters={key: 3.0})]
        run = prepare(dataclasses.replace(request, methods=variants), QUIET)
        assert [group.title for group in run.groups] == titles


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


def test_with_validation_training_images_stand_in_for_the_test_images(tmp_path):
    run = prepare(request_of(tmp_path, protocol=dataclasses.replace(DIGITS, validation=True)), QUIET)
    chosen = limited(find("digits", None, tmp_path).train, 10, 300)  # 30 a class, of each the last three held out
    last = np.concatenate([np.flatnonzero(chosen.labels == label)[-3:] for label in range(10)])
    np.testing.assert_array_equal(run.evaluator.labels.test, chosen.labels[np.sort(last)])
    np.testing.assert_array_equal(run.train.labels, np.delete(chosen.labels, last))
