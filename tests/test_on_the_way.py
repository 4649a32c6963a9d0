"""What models are worth on the way (`--eval-every`): a curve in the record, and nothing else is any different."""

import dataclasses

import jax
import numpy as np
import pytest
from test_runs import DIGITS, numbers, request_of, results, stop_after, tiny_bench

from jaxunlearn.errors import UserError
from jaxunlearn.results.records import better
from jaxunlearn.runs import running
from jaxunlearn.runs.scoring import ON_THE_WAY
from jaxunlearn.training.checkpoints import Saved
from jaxunlearn.training.history import History, Position
from jaxunlearn.training.loop import Compiled, Timing
from jaxunlearn.training.saving import Saving

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
__all__ = ["tiny_bench"]  # a fixture
PROTOCOL = dataclasses.replace(DIGITS, pretrain_epochs=1, unlearn_epochs=3, epoch_length="retain")
ASKED = {"seeds": (3, 4), "protocol": PROTOCOL, "method": "retrain retain_finetune output_mask", "unlearn_seeds": 2}


def of_method(records, name="retain_finetune"):
    return [record for record in records if record["method"] == name]


@pytest.fixture
def states(monkeypatch):
    """What is asked for its worth at the end of each group, as bytes."""
    found, train = [], running.train

    def kept(*args, **options):
        state, outcomes = train(*args, **options)
        found.append([np.asarray(x).tobytes() for x in jax.tree.leaves(state)])
        return state, outcomes

    monkeypatch.setattr(running, "train", kept)
    return found


def test_the_curve_leads_from_the_original_to_what_is_scored_and_changes_nothing(tmp_path, states, monkeypatch):
    compiled, call = [], Compiled.__call__

    def counted(program, *arguments):
        compiled.append(program) if program._program is None else None
        return call(program, *arguments)

    monkeypatch.setattr(Compiled, "__call__", counted)
    without = results(request_of(tmp_path / "a", **ASKED))
    expected, programs = list(states), len(compiled)
    states.clear()
    watched = results(request_of(tmp_path / "b", eval_every=2, **ASKED))
    assert states == expected and list(map(numbers, watched)) == list(map(numbers, without))
    assert len(compiled) == 2 * programs  # none is compiled for the curve
    assert all(record["curves"]["evaluated"] is None for record in without)
    assert all(record["curves"]["evaluated"] is None for record in watched if record["method"] != "retain_finetune")
    last = results(
        request_of(tmp_path / "d", **(ASKED | {"protocol": dataclasses.replace(PROTOCOL, unlearn_epochs=2)}))
    )
    for record, after_two in zip(of_method(watched), of_method(last), strict=True):
        curve = record["curves"]["evaluated"]
        assert curve["epoch"] == [0, 2, 3]
        for name in ON_THE_WAY:
            assert curve[name] == [record["before"][name], after_two[name], record[name]]
        assert "--eval-every 2" in record["command"] and record["scored"] == "last"
    ours, theirs = of_method(watched)[0], of_method(without)[0]
    assert better(ours, theirs) and not better(theirs, ours)


@pytest.mark.cpu
def test_it_is_kept_over_a_stop_and_the_key_is_the_same(tmp_path, monkeypatch):
    asked = ASKED | {"method": "retain_finetune", "unlearn_seeds": 1}
    undisturbed = results(request_of(tmp_path / "a", eval_every=1, **asked))
    stop_after(monkeypatch, 5 + 7)  # in the second epoch of three of five steps
    with pytest.raises(KeyboardInterrupt):
        results(request_of(tmp_path / "b", eval_every=1, **asked))
    steps = stop_after(monkeypatch, None)
    resumed = results(request_of(tmp_path / "b", eval_every=1, **asked))
    assert len(steps) == 4 * 5 - 12
    assert [r["curves"] for r in resumed] == [r["curves"] for r in undisturbed]
    assert [r["curves"]["evaluated"]["epoch"] for r in resumed] == [[0, 1, 2, 3]] * 2


def test_nothing_is_said_of_a_model_that_has_diverged():
    before = [Saved({}, Position(1, 0), History(diverged=at)) for at in (None, 2)]
    keeper = Saving([None, None], before, 0, 5, Timing(), 1000.0)
    keeper.note_worth(2, [{"retain_acc": 0.5}, {"retain_acc": 0.25}])
    keeper.note_worth(4, [{"retain_acc": 0.75}, {"retain_acc": None}])
    assert [own.evaluated for own in keeper.histories] == [
        {"epoch": [2, 4], "retain_acc": [0.5, 0.75]},
        {"epoch": [2, 4], "retain_acc": [None] * 2},
    ]
    keeper.close()


def test_a_number_below_one_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"^--eval-every 0: it must be at least 1$"):
        results(request_of(tmp_path, eval_every=0))
