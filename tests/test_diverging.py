"""Runs of which a seed diverges: its record says where, and nobody else's changes."""

import dataclasses

import pytest
from test_runs import QUIET, STEPPED, numbers, request_of, results, tiny_bench

from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.runs import running
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.saving import Saving
from jaxunlearn.training.unlearning import Unlearning

__all__ = ["tiny_bench"]  # a fixture
pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]


def test_a_seed_that_diverges_does_not_touch_the_others(tmp_path):
    rule = tmp_path / "wild.py"
    rule.write_text(
        "import jax, jax.numpy as jnp\n"
        "from jaxunlearn.methods import retain_finetune\n"
        "def rule(context, *, wild: bool = True):\n"
        "    inner = retain_finetune.rule(context)\n"
        "    def init(params, batch_stats, key):\n"
        "        state = inner.init(params, batch_stats, key)\n"
        "        return state._replace(extra=(state.extra, jax.random.bernoulli(key), key))\n"
        "    def step(params, state, retain, forget):\n"
        "        extra, chosen, key = state.extra\n"
        "        params, after, metrics = inner.step(params, state._replace(extra=extra), retain, forget)\n"
        "        worse = jnp.where(wild & chosen & (state.step == 6), jnp.inf, 1.0)\n"
        "        params = jax.tree.map(lambda x: x * worse, params)\n"
        "        metrics = metrics | {'loss': metrics['loss'] * worse}\n"
        "        return params, after._replace(extra=(after.extra, chosen, key)), metrics\n"
        "    return inner._replace(init=init, step=step)\n"
    )
    options = {"method": str(rule), "protocol": STEPPED, "seeds": (1, 2, 3)}
    calm = results(request_of(tmp_path / "a", settings={"wild": "false"}, **options))
    wild = results(request_of(tmp_path / "b", **options))
    assert {record["status"] for record in calm} == {"ok"} and len({r["status"] for r in wild}) == 2
    for one, other in zip(wild, calm, strict=True):
        if one["status"] == "ok":
            assert numbers(one) == numbers(other) and one["diverged_at"] is None
        else:
            assert one["diverged_at"] == {"phase": "unlearn", "step": 6} and one["retain_acc"] is None


@pytest.mark.parametrize("due", [True, False])
def test_weights_that_are_lost_in_the_last_step_are_seen_there(tmp_path, monkeypatch, due):
    monkeypatch.setattr(Saving, "due", lambda self: due)
    rule = tmp_path / "late.py"
    rule.write_text(
        "import jax, jax.numpy as jnp\n"
        "from jaxunlearn.methods import retain_finetune\n"
        "def rule(context):\n"
        "    inner = retain_finetune.rule(context)\n"
        "    def step(params, state, retain, forget):\n"
        "        last = state.step == context.epochs * context.steps_per_epoch - 1\n"
        "        params, after, metrics = inner.step(params, state, retain, forget)\n"
        "        return jax.tree.map(lambda x: jnp.where(last, jnp.inf, x), params), after, metrics\n"
        "    return inner._replace(step=step)\n"
    )
    (record,) = results(request_of(tmp_path, method=str(rule), protocol=STEPPED))
    assert record["diverged_at"] == {"phase": "unlearn", "step": record["unlearn_steps"] - 1}
    assert record["flags"]["collapsed"] is None


def test_where_pretraining_diverges_nothing_is_unlearned(tmp_path, monkeypatch):
    protocol = dataclasses.replace(STEPPED, pretrain_lr=1e30)
    monkeypatch.setattr(Unlearning, "epoch", lambda *_: pytest.fail("unlearned"))
    (record,) = results(request_of(tmp_path, protocol=protocol))
    assert record["status"] == "diverged" and record["diverged_at"]["phase"] == "pretrain"
    assert 0 < record["diverged_at"]["step"] < 5
    assert record["unlearn_steps"] == 0 and set(record["throughput"].values()) == {None}  # of epochs that never were
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("pretrained again"))
    (again,) = results(request_of(tmp_path, protocol=protocol))
    assert again["diverged_at"] == record["diverged_at"]


def test_a_diverged_run_says_so(tmp_path):
    rule = tmp_path / "explode.py"
    rule.write_text(
        "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n"
        "@loss_rule\n"
        "def rule(student, retain, forget, *, scale: float = 1.0):\n"
        "    return scale * cross_entropy(student(retain.images), retain.labels) * scale\n"
    )
    weights = tmp_path / "weights"
    request = request_of(tmp_path, method=str(rule), settings={"scale": "1e30"}, export_weights=weights)
    ((wild, warning),) = running.results(prepare(request, QUIET))
    assert warning is not None and "diverged" in warning and not weights.exists()
    assert wild["status"] == "diverged" and all(wild[name] is None for name in METRICS)
    assert wild["before"]["retain_acc"] is not None and wild["flags"]["collapsed"] is None
    assert wild["diverged_at"] == {"phase": "unlearn", "step": 0}
