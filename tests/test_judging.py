"""Seeds that learn nothing in pretraining: how they are found, drawn again, and what records and tables say of them."""

import dataclasses
import io
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runs import BENCH, DIGITS, numbers, request_of, results, stop_after, tiny_bench
from tiny import assert_close

from jaxunlearn.audit import collecting
from jaxunlearn.data.datasets import load
from jaxunlearn.errors import UserError
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import get_method
from jaxunlearn.results.rows import summarize
from jaxunlearn.results.tables import print_results
from jaxunlearn.runs import preparation, running
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.training import judging, resuming, saving
from jaxunlearn.training.checkpoints import Saved
from jaxunlearn.training.history import History, Position
from jaxunlearn.training.judging import judge_of
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.unlearning import Unlearning

pytestmark = [
    pytest.mark.usefixtures("tiny_models"),
    pytest.mark.filterwarnings("ignore:.*had learned nothing"),
]
__all__ = ["tiny_bench"]  # fixtures
LONGER = dataclasses.replace(DIGITS, pretrain_epochs=6)
SIZES = {"pretrain": 300, "retrain": 270}  # images an epoch


def with_brightness(dataset):
    """The digits as plain grey that says which they are, so that a tiny model learns something in a few steps."""
    grey = [
        s._replace(images=np.full_like(s.images, 25) * s.labels[:, None, None, None].astype(np.uint8))
        for s in dataset[2:4]
    ]
    return dataset._replace(train=grey[0], test=grey[1])


@pytest.fixture
def dying(monkeypatch):
    """Makes a function of (phase, seed, attempt) after which those have a layer that is 0 for every image."""
    monkeypatch.setattr(judging, "STEPS", 20)  # four epochs
    monkeypatch.setattr(preparation, "load", lambda *args: with_brightness(load(*args)))
    start = Pretraining.start

    def dies(*dead):
        def started(pretraining, keys):
            state = start(pretraining, keys)
            sizes = {key: SIZES[phase] for phase, *key in map(list, dead) for key in [tuple(key)]}
            gone = [
                any(
                    (jax.random.key_data(own) == jax.random.key_data(seed_keys([seed], [attempt])[0])).all()
                    and pretraining.images_per_epoch == size
                    for (seed, attempt), size in sizes.items()
                )
                for own in keys
            ]
            alive = jnp.logical_not(jnp.array(gone))[:, None].astype(jnp.float32)
            bn = {name: value * alive for name, value in state.params["bn"].items()}
            return state._replace(params=state.params | {"bn": bn})

        monkeypatch.setattr(Pretraining, "start", started)

    return dies


def saved(accuracy, loss, epoch=2):
    return Saved({}, Position(epoch, 0), History(sums={"accuracy": accuracy, "loss": loss}))


def test_what_counts_as_learning_nothing():
    judge = judge_of(np.repeat(np.arange(1, 100), 500), steps=387, epochs=80)
    assert (judge.epoch, judge.steps) == (2, 387)
    assert judge.accuracy == pytest.approx(1 / 99 + 3 * math.sqrt(98 / 99**2 / 49_500))
    assert judge.loss == pytest.approx(0.995 * math.log(99))
    chance, dead = 387 / 99, 387 * math.log(100)
    assert judge.untrained(saved([chance, chance], [dead, dead]))
    assert not judge.untrained(saved([chance, chance], [dead, dead], epoch=1))
    assert not judge.untrained(saved([chance, 2 * chance], [dead, dead]))
    assert not judge.untrained(saved([chance, chance], [dead, 0.95 * dead]))
    assert judge.untrained(saved([None, chance], [None, dead]))
    assert judge_of(np.ones(9, np.int32), steps=387, epochs=80) is None
    for unknown in ([], [chance], [chance, None]):
        assert not judge.untrained(saved(unknown, [dead, dead]))
    assert not judge.untrained(None)


def test_it_is_not_asked_too_early():
    labels = np.arange(10)
    assert judge_of(labels, steps=5, epochs=99) is None and judge_of(labels, steps=5, epochs=100).epoch == 100
    assert judge_of(labels, steps=400, epochs=1) is None and judge_of(labels, steps=400, epochs=2).epoch == 2
    assert judge_of(np.array([0, 0, 0, 1]), steps=250, epochs=2).accuracy == pytest.approx(0.75 + 3 * math.sqrt(3 / 64))


@pytest.mark.slow
def test_a_seed_is_drawn_again_and_the_others_wait_for_it(tmp_path, dying):
    alone = results(request_of(tmp_path / "alone", seeds=(2,), protocol=LONGER))
    dying(("pretrain", 1, 0), ("pretrain", 1, 1))
    with pytest.warns(UserWarning, match="pretrain: seed 1 had learned nothing after epoch 4: drawn again, .* 3 of 5"):
        first, second = results(request_of(tmp_path, seeds=(1, 2), protocol=LONGER))
    assert (first["status"], first["attempts"], first["untrained_in"]) == ("ok", {"pretrain": 3}, None)
    assert (second["status"], second["attempts"]) == ("ok", {"pretrain": 1})
    assert_close(second["before"], alone[0]["before"], 1e-5)
    folders = sorted(path.name for path in (tmp_path / "cache" / "pretrained").iterdir())
    assert len(folders) == 4 and sum("attempt" in name for name in folders) == 2


@pytest.mark.slow
def test_one_attempt_gives_the_row_as_it_is(tmp_path, dying, monkeypatch):
    dying(("pretrain", 1, 0))
    first, second = results(request_of(tmp_path, seeds=(1, 2), attempts=1, protocol=LONGER))
    assert (first["status"], first["untrained_in"], second["status"]) == ("untrained", "pretrain", "ok")
    assert first["retain_acc"] == pytest.approx(1 / 9, abs=0.03)  # one answer for all
    assert (first["retain_acc"], first["flags"]["collapsed"]) == (first["before"]["retain_acc"], False)
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained on"))
    monkeypatch.setattr(Unlearning, "epoch", lambda *_: pytest.fail("unlearned"))
    (again,) = results(request_of(tmp_path, seeds=(1,), attempts=1, protocol=LONGER))
    assert again["status"] == "untrained" and again["before"] == first["before"]


@pytest.mark.slow
def test_a_retrained_model_is_itself_whatever_became_of_the_original(tmp_path, dying):
    dying(("pretrain", 1, 0))
    (found,) = results(request_of(tmp_path, method="retrain", seeds=(1,), attempts=1, protocol=LONGER))
    assert (found["status"], found["untrained_in"], found["diverged_at"]) == ("ok", None, None)
    assert found["before"]["retain_acc"] == pytest.approx(1 / 9, abs=0.03) and found["retain_acc"] > 0.2
    assert found["throughput"]["pretrain_images_per_s"] is None and found["throughput"]["unlearn_steps_per_s"] > 0


@pytest.mark.slow
def test_an_audit_leaves_out_an_original_that_learned_nothing(tmp_path, dying):
    dying(("pretrain", 1, 0))
    request = request_of(tmp_path, method="retrain", seeds=(1, 2), attempts=1, protocol=LONGER)
    request = dataclasses.replace(request, methods=[*request.methods, get_method("output_mask")])
    assert list(collecting.collect(request, 2, Reporter(quiet=True))) == [
        f"{request.record_path(request.methods[1], 1).with_suffix('.npz')} was not written: the model is untrained"
    ]
    reference, retrained = collecting.load(request, request.methods[0])
    assert retrained.seeds == [1, 2] and collecting.load_originals(request, reference).seeds == [2]
    assert collecting.load(request, request.methods[1])[1].seeds == [2]
    # A failed attempt takes nothing from a model that a run of more attempts has left.
    request = dataclasses.replace(request, keep_predictions=True, attempts=2)
    list(running.results(prepare(request, Reporter(quiet=True))))
    assert collecting.load_originals(request, reference).seeds == [1, 2]
    list(running.results(prepare(dataclasses.replace(request, attempts=1), Reporter(quiet=True))))
    assert collecting.load_originals(request, reference).seeds == [1, 2]


@pytest.mark.slow
def test_after_the_last_attempt_it_is_taken_as_it_is(tmp_path, dying):
    dying(("retrain", 1, 0), ("retrain", 1, 1))
    (found,) = results(request_of(tmp_path, method="retrain", seeds=(1,), attempts=2, protocol=LONGER))
    assert (found["status"], found["untrained_in"]) == ("untrained", "retrain")
    assert found["attempts"] == {"pretrain": 1, "retrain": 2}
    (found,) = results(request_of(tmp_path, method="retrain", seeds=(1,), attempts=3, protocol=LONGER))
    assert (found["status"], found["attempts"]["retrain"]) == ("ok", 3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 22, 27])  # at first, in the second attempt, when both go on
def test_an_interrupted_run_comes_to_the_same_attempts_and_bits(tmp_path, dying, monkeypatch, steps):
    dying(("pretrain", 1, 0))
    undisturbed = results(request_of(tmp_path / "whole", seeds=(1, 2), protocol=LONGER))
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            results(request_of(tmp_path, seeds=(1, 2), protocol=LONGER))
    found = results(request_of(tmp_path, seeds=(1, 2), protocol=LONGER))
    assert list(map(numbers, found)) == list(map(numbers, undisturbed))
    assert [record["attempts"] for record in found] == [{"pretrain": 2}, {"pretrain": 1}]


@pytest.mark.slow
def test_what_is_unlearned_is_of_the_attempt_that_it_starts_from(tmp_path, dying, monkeypatch):
    dying(("pretrain", 1, 0))
    undisturbed = results(request_of(tmp_path / "whole", seeds=(1, 2), protocol=LONGER))
    request = request_of(tmp_path, method="retain_finetune scrub", seeds=(1, 2), protocol=LONGER, attempts=1)
    found = running.results(prepare(request, Reporter(quiet=True)))
    next(found), next(found)  # the first method is done, and its end still in the cache
    found.close()
    again = results(request_of(tmp_path, seeds=(1, 2), protocol=LONGER))
    for one, other in zip(again, undisturbed, strict=True):  # not to the bit: the second was not always alone
        for mine, theirs in ((one, other), (one["before"], other["before"])):
            assert [mine[name] for name in METRICS] == [theirs[name] for name in METRICS]


def test_an_epoch_of_which_a_part_is_unknown_is_unknown():
    metrics = {"loss": np.float32([1, 2])}
    assert saving._added({}, metrics, Position(1, 0)) == {"loss": [None, 3.0]}
    assert saving._added({"loss": [5.0]}, metrics, Position(1, 0)) == {"loss": [5.0, 3.0]}
    assert saving._added({"loss": [5.0, 4.0]}, metrics, Position(1, 7)) == {"loss": [5.0, 7.0]}
    assert saving._added({"loss": [5.0]}, metrics, Position(1, 7)) == {"loss": [5.0, None]}
    assert saving._added({}, {"loss": np.float32([np.inf])}, Position(0, 0)) == {"loss": [None]}


class Length(NamedTuple):
    """What is asked of a training to say what comes next."""

    epochs: int
    passes: int = 0


SIX, NONE = Length(6), Length(0)


def test_seeds_that_fell_behind_first_come_as_far_as_those_that_wait():
    judge = judge_of(np.arange(10), steps=250, epochs=6)
    good = saved([0, 250, 250], [0, 1, 1], 2)
    behind = good._replace(position=Position(1, 3))
    assert resuming._next([good, None], [1, 0], judge, SIX) == (2, [[1]])
    assert resuming._next([good, behind, None], [0, 0, 0], judge, SIX) == (2, [[1], [2]])
    assert resuming._next([good, good], [0, 1], judge, SIX) == (6, [[0, 1]])
    assert resuming._next([behind, None], [0, 0], judge, SIX) == (6, [[0], [1]])
    dead = saved([0, 25], [0, 250 * math.log(10)], 2)
    assert resuming._next([dead, good], [4, 0], judge, SIX) == (6, [[1]])
    assert resuming._next([dead, good._replace(position=Position(6, 0))], [4, 0], judge, SIX) == (6, [])


def test_what_takes_no_epoch_begins_and_is_done():
    done = Saved({}, Position(0, 0), History())
    assert resuming._next([None, done, None], [0, 0, 0], None, NONE) == (0, [[0, 2]])
    assert resuming._next([done, done], [0, 0], None, NONE) == (0, [])


def test_what_passes_over_images_first_begins_below_the_first_epoch():
    within = Saved({}, Position(-1, 3), History())
    assert resuming._next([None, within, within], [0, 0, 0], None, SIX._replace(passes=2)) == (6, [[0], [1, 2]])


def test_curves_are_the_means_of_whole_epochs():
    one = saved([100, None, 50], [500, None, 125])._replace(position=Position(2, 7))
    assert resuming._curves(one, 250) == {"accuracy": [0.4, None], "loss": [2.0, None]}
    assert resuming._curves(one._replace(history=History()), 250) == {}


def test_attempts_are_at_least_one(tmp_path):
    with pytest.raises(UserError, match="--attempts 0: it must be at least 1"):
        results(request_of(tmp_path, attempts=0))


def record(method, seed, score, **more):
    metrics = dict.fromkeys(("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score", "symmetric_score"), score)
    return {
        "bench": BENCH, "method": method, "seed": seed, "hyperparameters": {}, "before": metrics, "status": "ok",
        "timing": {"unlearn_s": 1.0, "evaluate_s": 1.0}, "protocol": {"precision": DIGITS.precision},
        "environment": {"device_kind": "cpu"}, "untrained_in": None, "attempts": {"pretrain": 1},
    } | metrics | more  # fmt: skip


def test_an_untrained_row_is_not_ranked_not_averaged_and_no_reference():
    dead = {"status": "untrained", "untrained_in": "retrain", "attempts": {"pretrain": 1, "retrain": 5}}
    records = [record("retrain", 1, 0.9, **dead), record("scrub", 1, 0.5), record("scrub", 2, 0.7)]
    pretrained, scrub, retrain = summarize(records, {})
    assert (pretrained.method, scrub.method, retrain.method) == ("pretrained", "scrub", "retrain")
    assert (retrain.untrained, retrain.learned, retrain.mean["retain_acc"]) == (1, False, 0.9)
    records[1] |= {"status": "untrained", "untrained_in": "pretrain", "attempts": {"pretrain": 2}}
    pretrained, scrub, retrain = summarize(records, {})
    assert (scrub.untrained, scrub.mean["retain_acc"], pretrained.untrained) == (1, 0.7, 1)
    text = io.StringIO()
    print_results([*records, record("better", 3, 0.95)], defaults={}, members=9, non_members=9, file=text)
    assert "above retrain" not in text.getvalue()  # nothing is above a reference, since there is none
    assert "1 of 2 untrained" in text.getvalue()
    assert "Drawn again" in text.getvalue() and "retrain of seed 1 (attempt 5)" in text.getvalue()
