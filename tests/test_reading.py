"""Which data a rule reads: what its docstring says is what its bits depend on."""

import jax.numpy as jnp
import pytest
from reading import FORGET, READABLE, RETAIN, declared, read_by
from test_methods import context, every_method, model

from jaxunlearn.methods.rule import Pass, UnlearningRule, init_state
from jaxunlearn.registry import build_rule, get_method, sentence

pytestmark = pytest.mark.usefixtures("tiny_models")


@every_method
def test_a_rule_reads_what_it_says_and_nothing_else(name):
    method = get_method(name)
    rule, (parts, passes) = build_rule(method, context()), declared(method.reads)
    assert {one.over for one in rule.passes} == passes
    assert read_by(rule, *model(0), context().epochs) == parts


def test_the_bits_tell_what_a_rule_reads():
    """Each kind alone, whichever way a rule comes by it."""

    def rule_of(reading, number):
        def init(params, batch_stats, key):
            return init_state(context(), params, batch_stats, key, extra=jnp.zeros(()))

        def step(params, state, retain, forget):
            return params, state._replace(extra=state.extra + reading(retain, forget)), {"loss": jnp.zeros(())}

        def prepare(params, state, retain_set, forget_set):
            return params, state._replace(extra=reading(*retain_set, *forget_set))

        def one_pass(kind):
            batches = (lambda batch: (batch, FORGET)) if kind == "retain" else (lambda batch: (RETAIN, batch))
            return Pass(kind, lambda p, s: s.extra, lambda p, s, c, batch: c + reading(*batches(batch)), finish)

        def finish(params, state, carry):
            return params, state._replace(extra=carry)

        ways = (init, step), (init, None, prepare), (init, None, None, tuple(map(one_pass, ("retain", "forget"))))
        return UnlearningRule(*ways[number])

    for kind, part in map(str.split, READABLE):
        for number in range(3):

            def reading(retain, forget, kind=kind, part=part):
                batch = retain if kind == "retain" else forget
                return (batch.images if part == "images" else batch.labels).astype(jnp.float32).mean()

            assert read_by(rule_of(reading, number), *model(0), 1) == {f"{kind} {part}"}
    assert declared("nothing") == (set(), set())
    assert declared("retain images, a pass over forget") == ({*READABLE} - {"retain labels"}, {"forget"})
    assert declared("a pass over all") == ({*READABLE}, {"all"})


@every_method
def test_a_rule_says_what_it_changed_and_whose_its_values_are(name):
    method = get_method(name)
    differs, values = (sentence(method.factory, word) for word in ("Differs", "Values"))
    assert differs and values
    whose = ("the paper's", "the published code's", "the submission's", "the task's", "ours", "tuned on ")
    assert values == "none" if not method.defaults else values.startswith(whose)


def test_a_sentence_ends_at_a_full_stop_and_not_at_a_point():
    def rule():
        """One line.

        Differs: Adam at 0.1 for
        .5 epochs. Values: none of this."""

    assert sentence(rule, "Differs") == "Adam at 0.1 for .5 epochs"
    assert sentence(rule, "Values") == ""  # not the beginning of a line
    assert sentence(None, "Reads") == ""
