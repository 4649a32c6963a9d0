"""Rule files that nobody would write on purpose: they keep the contract, or one line says why not."""

import contextlib
import io

import pytest
from fuzzing import fuzzed, inside, outcome
from hypothesis import given
from hypothesis import strategies as st
from test_methods import context

from jaxunlearn.errors import UserError
from jaxunlearn.registry import build_rule, get_method
from jaxunlearn.training.checking import check_rule

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
__all__ = ["inside"]  # a fixture

IMPORTS = "import sys\nimport jax\nimport jax.numpy as jnp\nimport numpy as np\nkept = []\n"
LOSS = (
    IMPORTS + "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n{}\n@loss_rule\n"
    "def rule(student, retain, forget{}):\n    images = retain.images\n    step, model = student.state.step, student\n"
    "    {}\n    loss = cross_entropy(student(images), retain.labels)\n    return {}\n"
)
CLASS = (
    IMPORTS + "from jaxunlearn.methods.rule import cross_entropy\n{}\nclass Mine:\n    def __init__(self{}): pass\n"
    "    def unlearn_step(self, model, retain, forget, optimizer, step, epoch):\n        images = retain.images\n"
    "        {}\n        loss = optimizer.step(lambda: cross_entropy(model(images), retain.labels))\n"
    "        return {}\n"
)
# What a file may have at its top, in the signature, before the loss, and in what it returns.
TOP = r"""
raise SystemExit(0)
class B(BaseException): pass¶raise B
class B(Exception):¶    def __str__(self): return 3¶raise B
raise GeneratorExit
raise StopIteration
raise ValueError('a\nb\x1b')
raise ExceptionGroup('x', [ValueError()])
1/0
(
  x
import absent
def f(): f()¶f()
x = '\ud800'
sys.modules[__name__] = None
del sys.modules[__name__]
def __getattr__(name): raise ValueError
# -*- coding: absent -*-
"""
SIGNATURE = r"""
, *, a=1
, *, a
, a=1
, *a
, **a
, /
, *, a=1/0
, *, a=jax
, *, a=1 << 99
, *, a='\udcff'
, *, a=float('nan')
, *, a={1: 2, 'b': 3}
, *, a=np.float32(1)
, *, a=jnp.ones(2)
"""
BODY = r"""
1/0
assert False
raise SystemExit(0)
raise GeneratorExit
raise StopIteration
sys.exit('a\nb')
images.item()
bool(images.sum())
images - forget.images
kept.append(images); images += kept[0].sum()
kept.append(model(images)) or kept[0]
jax.lax.psum(images, 'seed')
jax.debug.callback(print, images, ordered=True)
jax.experimental.io_callback(print, None, images, ordered=True)
model.absent
model.absent = images
images.absent_()
model(images[0])
images = images.at[99999].set(0)
images = np.asarray(images)
step + 10**30
jnp.zeros(10**12)
del loss
"""
RESULT = [
    "None",
    "()",
    "'x'",
    "1",
    "1.0",
    "True",
    "np.float64(1)",
    "jnp.zeros(2)",
    "[loss]",
    "loss*1j",
    "loss>0",
    "Ellipsis",
]
METRICS = (
    "{} None {1:loss} {'k':jax.random.key(0)} {'k':'x'} {'k':None} {'k':1j} {'[/x]':loss} {'loss':images} "
    "{'k':{'l':loss}} {'k':float('nan')} {'\\n':step} {'k':loss>0}"
)
LOSSES = ["loss", *RESULT, *(f"(loss, {metrics})" for metrics in METRICS.split())]
STEPS = [
    *RESULT,
    *(f"{{'loss': loss}} | ({metrics})" for metrics in METRICS.split()),
    "{'loss': epoch, 'images': step}",
]


def lines(text):
    """A line of a text, ¶ in it a new one; often the first, which does nothing."""
    first, *others = text.split("\n")[:-1]
    return st.just(first) | st.sampled_from([line.replace("¶", "\n") for line in others])


@fuzzed(60)
@given(
    text=st.builds(LOSS.format, lines(TOP), lines(SIGNATURE), lines("pass" + BODY), st.sampled_from(LOSSES))
    | st.builds(CLASS.format, lines(TOP), lines(SIGNATURE), lines("pass" + BODY), st.sampled_from(STEPS))
)
def test_any_rules(text, inside):
    (inside / "mine.py").write_text(text, "utf-8", "surrogatepass")
    for cached in inside.rglob("*.pyc"):
        cached.unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        if method := outcome(get_method, "mine.py"):
            outcome(check_rule, method, build_rule(method, context()), context(), [(4, 3), (4, 4)])


# ---- what failed once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "class B(BaseException): pass\n    raise B()"])
def test_a_rule_does_not_end_the_program(text, inside):
    (inside / "mine.py").write_text(f"def rule(context):\n    {text}\n")
    with pytest.raises(UserError, match=r"'mine': its rule\(\) failed: (SystemExit: 0|B)$"):
        build_rule(get_method("mine.py"), context())


@pytest.mark.parametrize(
    ("body", "result", "message"),
    [
        ("retain.images - forget.images", "loss", "does not keep the rule contract: .*shape"),  # in the last batch only
        ("kept.append(images); images += kept[0].sum()", "loss", "an array of an earlier call"),  # when traced again
        ("jax.experimental.io_callback(print, None, images, ordered=True)", "loss", "ordered"),  # with seeds together
        ("pass", "(loss, {'key': jax.random.key(0)})", "metric 'key' is not a scalar, or no real number"),
        ("pass", "(loss, {'j': loss * 1j})", "metric 'j' is not a scalar, or no real number"),
        ("raise SystemExit(0)", "loss", "SystemExit: 0"),
    ],
)
def test_rules_that_would_fail_after_pretraining(body, result, message, inside):
    (inside / "mine.py").write_text(LOSS.format("", "", body, result))
    method = get_method("mine.py")
    with pytest.raises(UserError, match=message):
        for sizes in ([(4, 4)], [(4, 3)]):  # as in a run: before the data is read, then with the batches that it makes
            check_rule(method, build_rule(method, context()), context(), sizes)


def test_what_a_rule_keeps_to_itself_is_met_with_one_size_of_batches_too(inside):
    (inside / "mine.py").write_text(
        "from jaxunlearn.methods import retain_finetune\n"
        "def rule(context):\n"
        "    inner, kept = retain_finetune.rule(context), []\n"
        "    def step(params, state, retain, forget):\n"
        "        kept.append(retain.images.mean())\n"
        "        params, state, metrics = inner.step(params, state, retain, forget)\n"
        "        return params, state, metrics | {'first': kept[0]}\n"
        "    return inner._replace(step=step)\n"
    )
    method = get_method("mine.py")
    with pytest.raises(UserError, match="an array of an earlier call"):
        check_rule(method, build_rule(method, context()), context(), [(4, 4)])


def test_a_keyboard_interrupt_stays_one(inside):
    (inside / "mine.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        get_method("mine.py")
