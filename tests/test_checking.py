"""A rule that does not keep its contract is refused before it runs, in one line that says how."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, PROTOCOL

from jaxunlearn.errors import UserError
from jaxunlearn.methods.rule import Pass, RuleState, UnlearningRule, init_state
from jaxunlearn.models.network import make_network
from jaxunlearn.registry import Method
from jaxunlearn.training.checking import check_rule
from jaxunlearn.training.unlearning import make_context

pytestmark = pytest.mark.usefixtures("tiny_models")


def halved(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float16), tree)


def raised(*args):
    raise ValueError("first line\nsecond line")


def over(name="forget", **parts):
    """Passes of a rule: one that does nothing but for these parts of it."""
    nothing = Pass(name, lambda p, s: jnp.zeros(()), lambda p, s, carry, b: carry, lambda p, s, carry: (p, s))
    return (nothing._replace(**parts),)


BROKEN = {
    "init fails": ({"init": raised}, "ValueError: first line second line$"),
    "init returns no state": ({"init": lambda p, b, k: (p, b)}, "init returned tuple, it must return a RuleState"),
    "init loses the statistics": (
        {"init": lambda p, b, k: RuleState({}, (), k, (), jnp.int32(0), jnp.int32(0))},
        "init changed the structure of batch_stats",
    ),
    "step fails": ({"step": raised}, "ValueError: first line second line$"),
    "step is no function": ({"step": 3}, "callable"),
    "nothing changes the model": ({"step": None}, "it has neither step nor prepare nor passes$"),
    "a pass is over no set": ({"passes": over("test")}, "pass 1 is over 'test': write retain, forget or all$"),
    "a pass is over no image": ({"passes": over(images=0)}, "pass 1: its images is 0, it must be None or a whole num"),
    "passes are one": ({"passes": over()[0]}, "its passes must be a tuple of Pass$"),
    "a pass draws with NumPy": (
        {"passes": over(step=lambda p, s, carry, b: carry + np.random.rand())},
        "pass 1 draws with numpy.random, which",
    ),
    "a pass knows one size of batches": (
        {"passes": over(init=lambda p, s: jnp.zeros(19), step=lambda p, s, carry, b: carry + b.labels)},
        "pass 1: step changed|TypeError|ValueError",
    ),
    "a pass fails": ({"passes": over(init=raised)}, "ValueError: first line second line$"),
    "a pass loses its carry": ({"passes": over(step=lambda *_: ())}, "pass 1: step changed the structure of the carry"),
    "a pass counts in integers": (
        {"step": None, "passes": over(step=lambda p, s, carry, b: b.labels.sum())},
        r"pass 1: step changed the carry from float32\[\] to int32\[\]",
    ),
    "a pass finishes with one": (
        {"passes": over(finish=lambda p, s, c: p)},
        "pass 1: finish must return .params, state",
    ),
    "a pass loses the params": (
        {"passes": over(finish=lambda p, s, c: ({}, s))},
        "pass 1: finish changed the structure of params",
    ),
    "init returns no state, and there is no step": (
        {"init": lambda p, b, k: (p, b), "step": None, "prepare": lambda p, s, r, f: (p, s)},
        "init returned tuple, it must return a RuleState",
    ),
    "step draws with NumPy": (
        {"step": lambda p, s, r, f: (p, s, {"loss": r.images.mean() * np.random.default_rng(0).normal()})},
        r"step draws with numpy.random, which .* use jax.random with state.key, in a class with model.random_key\(\)",
    ),
    "step draws with Python": (
        {"step": lambda p, s, r, f: (p, s, {"loss": r.images.mean() * random.random()})},
        "step draws with random, which gives the same numbers in every step and for every seed",
    ),
    "step branches on a value": ({"step": lambda p, s, r, f: 1 if r.labels[0] > 0 else 0}, "boolean conversion"),
    "step returns two": ({"step": lambda p, s, r, f: (p, s)}, r"must return \(params, state, metrics\)"),
    "params lose a part": ({"step": lambda p, s, r, f: ({}, s, {"loss": 0.0})}, "changed the structure of params"),
    "params change dtype": (
        {"step": lambda p, s, r, f: (halved(p), s, {"loss": 0.0})},
        r"changed params from float32\[6\] to float16\[6\]",
    ),
    "state loses a part": (
        {"step": lambda p, s, r, f: (p, s._replace(opt_state=()), {"loss": 0.0})},
        "changed the structure of state",
    ),
    "state changes shape": (
        {"step": lambda p, s, r, f: (p, s._replace(step=s.step[None]), {"loss": 0.0})},
        r"changed state from int32\[\] to int32\[1\]",
    ),
    "metrics are no dict": ({"step": lambda p, s, r, f: (p, s, 0.0)}, "metrics must be a dict with at least 'loss'"),
    "metrics have no loss": ({"step": lambda p, s, r, f: (p, s, {"a": 0.0})}, "metrics must be a dict"),
    "a metric is no scalar": (
        {"step": lambda p, s, r, f: (p, s, {"loss": 0.0, "a": jnp.zeros(2)})},
        "metric 'a' is not a scalar",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_rule_that_breaks_the_contract_is_refused_in_one_line(how):
    parts, message = BROKEN[how]
    context = make_context(make_network(PROTOCOL, CLASSES), PROTOCOL, CLASSES, 1)
    rule = UnlearningRule(
        parts.get("init", lambda p, b, k: init_state(context, p, b, k)),
        parts.get("step", lambda p, s, r, f: (p, s, {"loss": 0.0})),
        parts.get("prepare"),
        parts.get("passes", ()),
    )
    with pytest.raises(UserError, match=f"^method 'mine' does not keep the rule contract: .*{message}") as caught:
        check_rule(Method("mine", None, {}, {}), rule, context, [(4, 4)])
    assert "\n" not in str(caught.value)
