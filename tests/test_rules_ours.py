"""What the package's own rule computes, by numpy."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import (
    assert_same,
    gradient,
    in_numpy,
    linear_batch,
    linear_context,
    linear_model,
    log_softmax,
    softmax,
    take_step,
    vector,
)

from jaxunlearn.methods import masked_distillation
from jaxunlearn.methods.rule import Frozen
from jaxunlearn.registry import build_rule, get_method
from jaxunlearn.results import records
from jaxunlearn.results.statistics import t_interval

STUDY = Path(__file__).parent.parent / "results/masked_distillation"

pytestmark = [pytest.mark.usefixtures("in_float64", "quick_compilation"), pytest.mark.numbers]
TEACHER, STUDENT = 0, 1
RETAIN, FORGET = linear_batch(6, 0), linear_batch(5, 1, labels=0)


def begun(context=None, **hyperparameters):
    rule = masked_distillation.rule(context or linear_context(), **hyperparameters)
    return jax.jit(rule.step), rule.init(*linear_model(TEACHER), jax.random.key(0))


def divergence(model, stats):
    """KL of the teacher without class 0 and the model, both in eval mode: mean on retain plus mean on forget."""
    total = 0.0
    for batch in (RETAIN, FORGET):
        target = softmax(in_numpy(linear_model(TEACHER)[0]).in_eval_mode(batch, stats)[:, 1:])
        said = log_softmax(model.in_eval_mode(batch, stats))[:, 1:]
        total += (target * (np.log(target) - said)).sum(-1).mean()
    return total


@pytest.mark.parametrize("number", [0, 7])
def test_the_gradient_is_scaled_by_the_first_steps_polyak_length_and_a_cosine(number):
    context = linear_context(steps_per_epoch=3)
    step, state = begun(context, share=4.0)
    params, stats = linear_model(STUDENT)[0], state.batch_stats["bn"]["mean"]
    slope = gradient(lambda model: divergence(model, stats), in_numpy(params))
    loss = divergence(in_numpy(params), stats)
    first = 4 * context.eps / context.learning_rate * loss / (vector(slope) ** 2).sum()
    kept = 0.0 if number == 0 else 0.25
    scale = kept or first
    taken, after, metrics = take_step(
        step, params, state, RETAIN, FORGET, step=jnp.int32(number), extra=(state.extra[0], jnp.asarray(kept))
    )
    total = 3 * context.epochs
    factor = scale * (1 + np.cos(np.pi * number / total)) / 2
    assert_same([array / factor for array in taken], slope)
    np.testing.assert_allclose(after.extra[1], scale, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    np.testing.assert_array_equal(after.batch_stats["bn"]["mean"], stats)


@pytest.mark.parametrize("share", [1e-5, 4.0])
def test_the_first_step_is_polyaks_but_for_what_adam_caps(share):
    context = linear_context()
    rate, eps = context.learning_rate, context.eps
    step, state = begun(context._replace(optimizer=optax.adam(rate, eps=eps)), share=share)
    params, stats = linear_model(STUDENT)[0], state.batch_stats["bn"]["mean"]
    slope = vector(gradient(lambda model: divergence(model, stats), in_numpy(params)))
    taken = vector(take_step(step, params, state, RETAIN, FORGET)[0])
    polyak = share * divergence(in_numpy(params), stats) / (slope**2).sum() * slope
    np.testing.assert_allclose(taken, polyak / (1 + np.abs(polyak) / rate), rtol=1e-5, atol=1e-12)
    if share < 1:
        np.testing.assert_allclose(taken, polyak, rtol=0.01)


def test_a_model_that_is_there_already_stays():
    """Without the forgotten class there is nothing to learn, and what rounding leaves is not made larger."""
    context = linear_context()
    step, state = begun(context._replace(optimizer=optax.adam(context.learning_rate, eps=context.eps)))
    params, batch_stats = state.extra[0]
    gone = jax.tree.map(lambda x: x, params)
    gone["head"]["bias"] = gone["head"]["bias"].at[0].set(-100)
    taken, after, metrics = take_step(
        step, gone, state._replace(extra=(Frozen(gone, batch_stats), jnp.zeros(()))), RETAIN, FORGET
    )
    assert metrics["loss"] == pytest.approx(0, abs=1e-12)
    assert np.abs(vector(taken)).max() < 1e-12 and after.extra[1] <= 1


def test_the_variants_of_the_study_are_the_rule_but_for_what_is_switched():
    variants = get_method(str(STUDY / "variants.py"))
    step, state = begun()
    own = build_rule(variants, linear_context())
    params = linear_model(STUDENT)[0]
    expected, after, _ = step(params, state, RETAIN, FORGET)
    actual, other, _ = jax.jit(own.step)(params, own.init(*linear_model(TEACHER), jax.random.key(0)), RETAIN, FORGET)
    for one, two in zip(*map(jax.tree.leaves, ((expected, after.extra[1]), (actual, other.extra[1]))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9)


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in STUDY.glob("*/variants-*")}), ids=lambda path: path.name
)
def test_the_differences_of_the_study_are_those_of_its_records(folder):
    said = subprocess.run(
        [sys.executable, STUDY / "differences.py", folder], capture_output=True, text=True, check=True
    )
    lines = {line[:30].strip(): line[30:].split() for line in said.stdout.splitlines()}
    made = [[records.read(path) for path in sorted(one.glob("*.json"))] for one in folder.glob("variants-*")]
    gaps = {
        str(own[0]["hyperparameters"]): [record["companions"]["against_retrain"]["average_gap"] for record in own]
        for own in made
    }
    rule = np.array(gaps[str(get_method(str(STUDY / "variants.py")).hyperparameters)])
    expected = [
        [
            f"{np.mean(own):.3f}",
            f"{np.mean(own - rule):+.3f}",
            "±",
            f"{t_interval(own - rule):.3f}",
            str(len(own)),
            "pairs",
        ]
        for own in map(np.array, gaps.values())
    ]
    assert sorted(lines.values()) == sorted(expected)
    assert lines["the rule"][1] == "+0.000"
