"""The command, end to end on a tiny model: what it makes, takes, shows and leaves; and audits of known models."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from example_record import COMPANIONS, example_record
from test_bench import BENCH, TINY

from jaxunlearn import benchmarks
from jaxunlearn.audit import collecting
from jaxunlearn.audit.auditing import attack_all, audits
from jaxunlearn.audit.collecting import SETS, find, load_originals
from jaxunlearn.audit.keeping import read_audit, write_audit
from jaxunlearn.commands.main import main
from jaxunlearn.errors import UserError
from jaxunlearn.registry import Method, get_method
from jaxunlearn.results import records
from jaxunlearn.runs.request import Request

OPTIONS = ("--bench", BENCH, "--method", "output_mask", "--models", "4", "--together", "3", "--cache-dir", "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture
def audit(folder, monkeypatch, capsys):
    """Runs the command in one folder for all tests: (status, stdout, stderr, seeds and methods of each run)."""
    tiny = dataclasses.replace(TINY, pretrain_epochs=1, train_limit=320)
    monkeypatch.setitem(benchmarks.BENCHMARKS, BENCH, tiny)
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.chdir(folder)
    runs, requests, alive, prepare = [], [], [], collecting.prepare

    def counted(request, reporter):
        requests.append(request)
        alive.append(len(jax.live_arrays()))
        runs.append((list(request.seeds), [method.name for method in request.methods]))
        return prepare(request, reporter)

    monkeypatch.setattr(collecting, "prepare", counted)

    def run(*more):
        runs.clear()
        status = main(["audit", *OPTIONS, "--devices", "1", *more])
        return status, *capsys.readouterr(), list(runs)

    run.requests, run.alive = requests, alive
    return run


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_it_makes_what_is_missing_and_takes_what_is_there(audit, folder):
    status, out, err, runs = audit()
    assert (status, err) == (0, "")
    assert runs == [([0, 1, 2], ["retrain", "output_mask"]), ([3], ["retrain", "output_mask"])]
    assert audit.alive[1] <= audit.alive[0]  # nothing of the first group is left when the second begins
    for text in ("untouched", "output_mask", "retrain halved", "U-LiRA", "models an hour", "4 more of each"):
        assert text in out
    record = read_audit(folder / "runs" / "audit" / BENCH / "output_mask-N4.json")
    assert record["seeds"] == [0, 1, 2, 3] and record["command"].endswith("--method output_mask --models 4 --devices 1")
    assert record["attacks"]["unlearned"]["true_class"]["ulira"]["auc"] == 1  # p_y is nothing: no retrained model's is
    models = folder / "runs" / BENCH
    first = np.load(models / "pretrained" / "seed0.npz")
    masked = np.load(models / "output_mask" / "seed0.npz")
    known = json.loads((models / "output_mask" / "seed0.json").read_text())
    assert (first["forget_train"].argmax(1) == 0).mean() == pytest.approx(
        known["before"]["companions"]["forget_train_acc"], abs=0.02
    )
    assert np.isneginf(masked["forget_train"][:, 0]).all()

    status, again, err, runs = audit("--json")
    assert (status, err, runs) == (0, "", [])
    without = [
        {name: value for name, value in one.items() if name != "finished_at"} for one in (record, json.loads(again))
    ]
    assert without[0] == without[1]

    # What was written in part, or is of another run, is not taken; and made anew, alone.
    request = audit.requests[0]
    retrain, mask = request.methods
    stale = json.loads((models / "output_mask" / "seed1.json").read_text()) | {
        "finished_at": "2000-01-01T00:00:00+00:00"
    }
    (models / "output_mask" / "seed1.json").write_text(json.dumps(stale))
    (models / "output_mask" / "seed3.npz").unlink()
    assert [bool(find(request, mask, seed)) for seed in range(4)] == [True, False, True, False]
    assert find(request, mask._replace(source="of another file"), 0) is None
    other = dataclasses.replace(request, protocol=dataclasses.replace(request.protocol, unlearn_lr=0.5))
    assert find(other, mask, 0) is None
    with pytest.raises(UserError, match=r"output_mask/seed1.json or what its model says is being written"):
        list(audits(request))
    _, _, _, runs = audit("--json")
    assert runs == [([1, 3], ["retrain", "output_mask"])]
    (models / "retrain" / "seed1.npz").unlink()  # alone it would have no other to be compared with, as before
    status, _, err, runs = audit("--json")
    assert (status, err, runs) == (0, "", [([1, 0], ["retrain"])])
    (models / "pretrained" / "seed2.npz").unlink()
    (models / "retrain" / "seed0.npz").write_bytes(b"PK")
    assert [bool(find(request, retrain, seed)) for seed in range(4)] == [False, True, False, True]
    fuller = json.loads((models / "retrain" / "seed0.json").read_text())
    fuller["companions"]["full"] = COMPANIONS["full"]
    (models / "retrain" / "seed0.json").write_text(json.dumps(fuller))
    status, _, err, runs = audit()  # which would train, and then be kept out by the better record
    assert (status, runs) == (2, []) and "was evaluated in full or with --eval-every" in err and err.count("\n") == 1


def test_originals_of_other_images_are_not_those_of_a_retrained_model(tmp_path):
    retrain = Method("retrain", None, {}, {})
    bench = "resnet20-digits-class0"
    request = Request(bench, benchmarks.get_benchmark(bench), [retrain], [0], tmp_path, tmp_path)
    record = example_record(bench=bench, method="retrain", seed=0, hyperparameters={}, rule_digest=None)
    record |= {"protocol": dataclasses.asdict(request.protocol)}
    path = request.record_path(retrain, 0)
    assert records.write(path, record, force=False)
    np.savez(path.with_suffix(".npz"), finished_at=record["finished_at"])
    originals = request.originals_path(0)
    originals.parent.mkdir(parents=True)
    np.savez(originals, digest=record["dataset"]["digest"])
    assert find(request, retrain, 0)
    assert load_originals(request, [record]).seeds == []  # it has failed, and says nothing
    np.savez(originals, digest="of other images")
    assert find(request, retrain, 0) is None


def test_a_model_that_learned_nothing_in_fewer_attempts_is_drawn_again(tmp_path):
    bench, scrub = "resnet20-digits-class0", get_method("scrub")
    request = Request(bench, benchmarks.get_benchmark(bench), [scrub], [0], tmp_path, tmp_path)
    known = {"hyperparameters": scrub.hyperparameters, "protocol": dataclasses.asdict(request.protocol)}
    known |= {"rule_digest": scrub.source or None, "status": "untrained", "untrained_in": "pretrain"}
    for tries, taken in ((1, False), (request.attempts, True)):
        record = example_record(bench=bench, method="scrub", seed=0, **known, attempts={"pretrain": tries})
        assert records.write(request.record_path(scrub, 0), record, force=True)
        assert bool(find(request, scrub, 0)) is taken


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--models", "3"), "--models 3: it must be from 4"),
        (("--together", "0"), "--together 0: it must be at least 1"),
        (("--method", "retrain"), "--method retrain: name a method that is to be told from it"),
        (("--plot", "roc.pdf"), "--plot roc.pdf: its name must end in .png or .svg"),
        (("--plot", "/proc/nowhere/roc.png"), "/proc/nowhere"),
        (("--set", "protocol.init_weights=x"), "no such field"),
        (("--set", "protocol.pretrain_epochs=1"), "it has a flag of its own, --pretrain-epochs"),
    ],
)
def test_what_is_wrong_is_one_line(audit, more, said):
    status, out, err, runs = audit(*more)
    assert (status, out, runs) == (2, "", []) and said in err and err.count("\n") == 1


def test_a_plot_without_matplotlib_is_one_line(audit, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    status, _, err, runs = audit("--plot", "roc.png")
    assert (status, runs) == (2, []) and "--plot needs matplotlib: pip install -e" in err and err.count("\n") == 1


def margins(rng, models, shift=0.0):
    sizes = {"forget_train": 40, "retain_train": 60, "retain_test": 60}
    return {
        name: np.linspace(-3, 5, size) + (shift if name == "forget_train" else 0) + rng.normal(size=(models, size))
        for name, size in sizes.items()
    }


@pytest.mark.parametrize(("shift", "forgot"), [(0.0, True), (1.0, False), (8.0, False)])
def test_every_attack_tells_who_forgot(shift, forgot):
    """Retrained models twice, with a leak of one deviation, and untouched ones."""
    rng = np.random.default_rng(0)
    found = attack_all(margins(rng, 32, shift), margins(rng, 32), kept=0.9)
    klom, quality = found["klom"], found["forgetting_quality_of_originals"]
    assert all(klom[name] == pytest.approx(klom["floor"], rel=0.35) for name in SETS[1:])
    assert (klom["forget_train"] < 1.35 * klom["floor"]) is forgot
    assert (quality["points"] > 0.7 * quality["ceiling"]) is forgot
    assert quality["score"] == pytest.approx(0.9 * quality["points"])
    for attack in ("ulira", "rmia"):
        assert (abs(found[attack]["auc"] - 0.5) <= found[attack]["auc_half_width"]) is forgot
    low, high = found["ulira"]["tpr_interval"]
    assert (low <= 0.01 <= high) is forgot


def test_attacks_that_so_few_models_do_not_carry_are_left_out():
    rng = np.random.default_rng(0)
    found = attack_all(margins(rng, 2), margins(rng, 2), kept=1.0)
    assert found["ulira"] is None and found["rmia"] is None and found["klom"]["floor"] > 5


def example_audit():
    rng = np.random.default_rng(0)
    pretrained, unlearned = (
        {name: attack_all(margins(rng, 8, shift), margins(rng, 8), 1.0) for name in ("true_class", "retained")}
        | {"models": 8, "population_auc": 0.5}
        for shift in (5, 0)
    )
    return {
        "schema": 1,
        "bench": BENCH,
        "method": "scrub",
        "models": 8,
        "seeds": list(range(8)),
        "attacks": {"pretrained": pretrained, "unlearned": unlearned, "retrained": None},
        "cost": {
            "pretrain_s": 1.0,
            "retrain_s": 1.0,
            "unlearn_s": 0.5,
            "evaluate_s": 0.1,
            "models_per_hour": 100.0,
            "as_many_again_s": 20.0,
        },
        "protocol": {},
        "hyperparameters": {},
        "rule_digest": None,
        "dataset": {},
        "command": "jaxunlearn audit",
        "environment": {"device_kind": "cpu"},
        "finished_at": "2026-01-01T00:00:00+00:00",
    }


def test_a_record_is_held_to_the_schema_when_it_is_written_and_read(tmp_path):
    path, record = tmp_path / "a" / "scrub-N8.json", example_audit()
    write_audit(path, record)
    assert read_audit(path) == record
    wrong = copy.deepcopy(record)
    wrong["attacks"]["unlearned"]["retained"]["ulira"]["auc"] = 1.5
    with pytest.raises(ValueError, match=r"attacks\.unlearned\.retained\.ulira\.auc is 1\.5: it must be at most 1"):
        write_audit(path, wrong)
    assert read_audit(path) == record
    path.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"cannot read the audit .*retained\.ulira\.auc is 1\.5"):
        read_audit(path)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_curves_are_drawn(tmp_path, kind):
    pytest.importorskip("matplotlib")
    from jaxunlearn.report.plots_audit import plot_curves

    plot_curves([example_audit()], tmp_path / "new" / f"roc.{kind}")
    assert (tmp_path / "new" / f"roc.{kind}").stat().st_size > 10_000
