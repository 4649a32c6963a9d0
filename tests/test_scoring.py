"""What records say beside the scores, of whole runs: companions, references, several unlearnings of one original."""

import numpy as np
import pytest
from test_runs import BENCH, request_of, results, tiny_bench

from jaxunlearn.results import schema

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
__all__ = ["tiny_bench"]  # a fixture


def test_records_are_compared_with_the_retrained_model_of_their_seed(tmp_path):
    options = {"method": "retrain retain_finetune output_mask", "seeds": (1, 2), "evaluate": "full"}
    found = {(r["method"], r["seed"]): r for r in results(request_of(tmp_path, **options))}
    for (method, seed), record in found.items():
        schema.check(record)
        other = 3 - seed if method == "retrain" else seed  # with itself it would be equal
        beside, before = record["companions"], record["before"]["companions"]
        assert beside["against_retrain"]["seed"] == other and before["against_retrain"]["seed"] == seed
        there = found["retrain", other]
        gap = abs(record["forget_acc"] - there["forget_acc"])
        assert beside["against_retrain"]["gaps"]["forget_test"] == pytest.approx(gap)
        excess = beside["full"]["probe_acc"] - there["companions"]["full"]["probe_acc"]
        assert beside["full"]["probe_excess"] == pytest.approx(excess)
        above = record["unlearn_score"] > there["unlearn_score"]
        assert record["flags"]["above_retrain"] is (None if method == "retrain" else above)
        if method == "output_mask":  # it hides the class and forgets nothing
            assert record["forget_acc"] == 0 and record["flags"]["output_mask"] and record["unlearn_steps"] == 0
            assert beside["full"]["relearning"] == before["full"]["relearning"]
            assert beside["full"]["probe_acc"] == before["full"]["probe_acc"]
            assert (
                beside["against_retrain"]["gaps"]["retain_test"]
                <= before["against_retrain"]["gaps"]["retain_test"] + 0.1
            )
    one = results(request_of(tmp_path / "alone", method="retrain", seeds=(1,)))[0]
    assert one["companions"]["against_retrain"] is None and one["flags"]["above_retrain"] is None


def test_one_original_is_unlearned_several_times(tmp_path):
    options = {"method": "retain_finetune output_mask", "seeds": (1, 2), "unlearn_seeds": 2}
    found = results(request_of(tmp_path, **options, keep_predictions=True))
    made = [(r["method"], r["seed"], r["unlearn_seed"]) for r in found]
    assert made == [("retain_finetune", seed, draw) for seed in (1, 2) for draw in (0, 1)] + [
        ("output_mask", seed, 0) for seed in (1, 2)
    ]
    first, again, other = found[:3]
    assert first["before"] == again["before"] != other["before"]
    assert first["curves"]["pretrain"] == again["curves"]["pretrain"] != other["curves"]["pretrain"]
    assert first["curves"]["unlearn"] != again["curves"]["unlearn"]
    files = {path.name for path in (tmp_path / "runs" / BENCH / "retain_finetune").iterdir()}
    assert files == {
        f"seed{seed}{draw}.{kind}" for seed in (1, 2) for draw in ("", "-unlearn1") for kind in ("json", "npz")
    }
    # What the pretrained models say is kept once a seed, beside no record.
    originals = tmp_path / "runs" / BENCH / "pretrained"
    assert {path.name for path in originals.iterdir()} == {"seed1.npz", "seed2.npz"}
    asked = np.load(originals / "seed2.npz")
    right = asked["forget_train"].argmax(1) == asked["forget_train_labels"]
    assert right.mean() == pytest.approx(other["before"]["companions"]["forget_train_acc"])
    kept = np.load(tmp_path / "runs" / BENCH / "retain_finetune" / "seed1-unlearn1.npz")
    assert kept["finished_at"] == again["finished_at"]
    right = kept["forget_train"].argmax(1) == kept["forget_train_labels"]
    assert right.mean() == pytest.approx(again["companions"]["forget_train_acc"])
    (alone,) = results(request_of(tmp_path / "alone", seeds=(1,)))  # the first draw is what one has without
    np.testing.assert_allclose(alone["curves"]["unlearn"]["loss"], first["curves"]["unlearn"]["loss"], rtol=1e-4)
