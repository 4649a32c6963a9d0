"""Tuning: what a study makes of records, what its file keeps, and the command on scikit-learn's digits."""

import dataclasses
import functools
import json
import operator
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from example_record import COMPANIONS, diverged_record, example_record
from test_bench import BENCH, bench

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.registry import get_method
from jaxunlearn.results import records, schema
from jaxunlearn.runs.request import Request
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.unlearning import Unlearning
from jaxunlearn.tuning import running
from jaxunlearn.tuning.studies import best_of, check_images, resumed, save, study_of, trial_of, with_trial

pytestmark = pytest.mark.usefixtures("tiny_models")
__all__ = ["bench"]  # a fixture
DIGITS = "resnet20-digits-class0"


def record(gap=0.1, **changes):
    """Of a trial with this gap; None: the retrained model beside it learned nothing."""
    against = None if gap is None else COMPANIONS["against_retrain"] | {"average_gap": gap}
    return example_record(companions=COMPANIONS | {"against_retrain": against}, **changes)


def test_a_trial_is_the_mean_of_the_records_that_count():
    untrained = record(0.9, status="untrained", untrained_in="pretrain")
    before = diverged_record(diverged_at={"phase": "pretrain", "step": 3})
    trial = trial_of([record(0.1, retain_acc=0.8), record(0.3), record(None), untrained, before])
    assert (trial["average_gap"], trial["retain_acc"], trial["status"]) == (0.2, 0.85, "ok")
    assert (trial["counted"], trial["records"]) == (2, 5)
    assert trial["gaps"] == COMPANIONS["against_retrain"]["gaps"]


def test_what_diverged_or_collapsed_is_never_the_best():
    flags = {"collapsed": True, "inverted_membership": True, "above_retrain": None, "output_mask": False}
    lost = trial_of([record(0.01), diverged_record(diverged_at={"phase": "unlearn", "step": 3})])
    collapsed = trial_of([record(0.02, flags=flags), record(0.02)])
    nothing = trial_of([record(None)])
    assert lost["status"] == "diverged" and nothing["average_gap"] is None
    assert collapsed["flags"] == {"collapsed": 1, "inverted_membership": 1}
    assert best_of([lost, collapsed, nothing]) is None
    assert best_of([lost, trial_of([record(0.3)]), collapsed, trial_of([record(0.2)]), trial_of([record(0.2)])]) == 3


def request_in(folder, settings=None, seeds=(42,)):
    protocol = dataclasses.replace(get_benchmark(DIGITS), validation=True)
    return Request(DIGITS, protocol, [get_method("scrub", settings)], seeds, folder, folder)


def study_in(folder, settings=None, seeds=(42,)):
    request = request_in(folder, settings, seeds)
    return study_of(request, request.methods[0], 3, settings or {}, {})


def test_what_had_no_model_to_compare_with_is_tried_again(tmp_path):
    study = study_in(tmp_path)
    first, second, third = study.wanted
    save(with_trial(with_trial(study, [record(None, hyperparameters=first)]), [record(hyperparameters=second)]))
    again = resumed(study, force=False)
    assert [one.hyperparameters for one in again.pending] == [first, third]
    assert with_trial(again, [record(0.05, hyperparameters=first)]).content["best"] == 0


def test_trials_of_another_process_are_kept(tmp_path, monkeypatch):
    study, (first, second, third) = study_in(tmp_path), study_in(tmp_path).wanted

    def results(run):
        yield record(hyperparameters=first), None
        for own in (second, third):  # by the other one, which was told of three
            save(with_trial(resumed(study, force=False), [record(0.05, hyperparameters=own)]))
        yield record(hyperparameters=second), None

    monkeypatch.setattr(
        running, "prepare", lambda request, reporter: SimpleNamespace(digest=record()["dataset"]["digest"])
    )
    monkeypatch.setattr(running, "results", results)
    (found,) = running.tune(request_in(tmp_path), [study._replace(wanted=[first, second])], None, False, pytest.fail)
    assert found.content == json.loads(found.path.read_text()) and found.content["best"] == 2
    assert [one["average_gap"] for one in found.content["trials"]] == [0.1, 0.1, 0.05]


def test_processes_write_a_study_one_after_the_other(tmp_path, monkeypatch):
    study = study_in(tmp_path)._replace(wanted=study_in(tmp_path).wanted[:2])
    first, second = study.wanted

    def saved_by_another(asked, force):
        """Another one begins to add its trial between this one's reading and its writing."""
        found = resumed(asked, force)
        monkeypatch.setattr(running, "resumed", resumed)
        monkeypatch.setattr(running, "results", lambda run: iter([(record(0.05, hyperparameters=second), None)]))
        other = threading.Thread(target=running.tune, args=(request_in(tmp_path), [study], None, False, pytest.fail))
        others.append(other)
        other.start()
        other.join(0.5)  # it would have ended long ago
        return found

    def results(run):
        monkeypatch.setattr(running, "resumed", saved_by_another)
        yield record(hyperparameters=first), None

    others = []
    monkeypatch.setattr(
        running, "prepare", lambda request, reporter: SimpleNamespace(digest=record()["dataset"]["digest"])
    )
    monkeypatch.setattr(running, "results", results)
    running.tune(request_in(tmp_path), [study], None, False, pytest.fail)
    others[0].join()
    assert [one["average_gap"] for one in json.loads(study.path.read_text())["trials"]] == [0.1, 0.05]


def test_trials_that_saw_other_images_are_not_gone_on_with(tmp_path):
    study = study_in(tmp_path)
    check_images(study, "any")
    save(with_trial(study, [record(hyperparameters=study.wanted[0])]))
    known = resumed(study, force=False)
    check_images(known, record()["dataset"]["digest"])
    with pytest.raises(UserError, match=r"scrub\.json has trials that saw other images: pass another --out"):
        check_images(known, "another")


def test_the_trials_that_are_kept_are_held_to_the_schema():
    kept = list(Path(__file__).parent.parent.glob("results/tuning/*/*.json"))
    for path in kept:
        study = records.parse(path)
        schema.check(study, "tuning")
        assert study["best"] == best_of(study["trials"])
    assert kept


@pytest.mark.parametrize(
    "damage", ["[]", "{", "\0", '"trials"', "{}", ("best",), ("trials", 0, "average_gap"), ("trials", 0, "status")]
)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    study = study_in(tmp_path)
    save(with_trial(study, [record(hyperparameters=study.wanted[0])]))
    if isinstance(damage, str):
        study.path.write_text(damage)
    else:  # what is missing
        content = json.loads(study.path.read_text())
        del functools.reduce(operator.getitem, damage[:-1], content)[damage[-1]]
        study.path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"it is no file of tuning's: .*: pass --force to put that file aside"
    ) as caught:
        resumed(study, force=False)
    assert "\n" not in str(caught.value)


def test_what_is_of_other_settings_is_put_aside_and_never_lost(tmp_path):
    study = functools.partial(study_in, tmp_path)
    first = with_trial(study(), [record(hyperparameters=study().wanted[0])])
    save(first)
    assert resumed(study(), force=False) == first and len(first.pending) == 2 and first.content["best"] == 0
    for other in (study(seeds=(1,)), study({"temperature": "2"})):
        with pytest.raises(UserError, match=r"is of other settings .* there, .* here.*: pass --force"):
            resumed(other, force=False)
    content = first.path.read_bytes()
    assert resumed(study(seeds=(1,)), force=True).content["trials"] == []
    (aside,) = first.path.parent.iterdir()
    assert aside != first.path and aside.read_bytes() == content
    first.path.write_text("[]")
    with pytest.raises(UserError, match="is no file of tuning's"):
        resumed(study(), force=False)


@pytest.mark.slow
def test_tuning_goes_on_where_it_was_and_names_the_best(bench, tmp_path, monkeypatch):
    arguments = ("--bench", BENCH, "--method", "negative_gradient", "--devices", "1", "--train-limit", "300")
    arguments = (*arguments, "--set", "protocol.unlearn_lr=0.01", "--range", "negative_gradient.forget_weight=0:1")
    tune = functools.partial(bench, command="tune")
    file = tmp_path / "runs" / "tuning" / BENCH / "negative_gradient.json"

    assert tune(*arguments, "--trials", "1")[0] == 0
    first = json.loads(file.read_text())["trials"]
    status, out, err = tune(*arguments, "--trials", "2")
    content = json.loads(file.read_text())
    assert (
        (status, err) == (0, "") and len(content["trials"]) == 2 and content["trials"][:1] == first
    )  # with its seconds
    assert first[0]["hyperparameters"] == {"forget_weight": 0.5} != content["trials"][1]["hyperparameters"]
    best = content["trials"][content["best"]]
    assert content["protocol"] == {"train_limit": 300, "validation": True, "unlearn_lr": 0.01}
    assert content["ranges"] == {"forget_weight": [0.0, 1.0]} and content["held"] == {}
    (line,) = [line for line in out.splitlines() if line.startswith("The best on the test images: ")]
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == ["jaxunlearn", "bench"] and "--against-retrain" in words and "--validation" not in words
    chosen = best["hyperparameters"]["forget_weight"]
    assert chosen == 0.5 or f"negative_gradient.forget_weight={chosen}" in words
    records = [json.loads(path.read_text()) for path in tmp_path.glob(f"runs/{BENCH}/negative_gradient-*/seed42.json")]
    assert sorted(one["companions"]["against_retrain"]["average_gap"] for one in records) == pytest.approx(
        sorted(one["average_gap"] for one in content["trials"]), abs=1e-6
    )
    assert all(one["protocol"]["validation"] for one in records)
    assert not list(tmp_path.glob("cache/unlearning/*"))

    for training in (Pretraining, Unlearning):
        monkeypatch.setattr(training, "epoch", lambda *_: pytest.fail("trained again"))
    status, out, _ = tune(*arguments, "--trials", "2", "--json")
    assert status == 0 and json.loads(out) == json.loads(file.read_text())
    before = file.read_bytes()
    status, _, err = tune(*arguments, "--trials", "2", "--seeds", "7")
    assert status == 2 and "seeds: [42] there, [7] here" in err and "--force" in err and err.count("\n") == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method scrub --trials 0", "--trials 0"),
        ("--method scrub --range scrub=1:2", "write NAME.KEY=LOW:HIGH"),
        ("--method scrub --range ssd.alpha=1:2", "not among the methods"),
        ("--method scrub --range scrub.heat=1:2", "no hyperparameter 'heat'"),
        ("--method scrub --range scrub.temperature=2:1", "the high end one that is no lower"),
        ("--method salun --range salun.share=0.5:2", "share is"),
        ("--method retrain", "it is what others are compared with"),
        ("--method scrub --validation", "--validation"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_done(bench, tmp_path, arguments, said):
    status, out, err = bench("--bench", BENCH, "--devices", "1", *arguments.split(), command="tune")
    assert (status, out) == (2, "") and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
