import dataclasses

import pytest
from example_record import COMPANIONS, DROPPED, METRICS, PROTOCOL, diverged_record, example_record, place
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from jaxunlearn.results.schema import VERSION, check, load_schema, upgrade


def paths(value, path=""):
    """Of everything in a record."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        yield from paths(inner, f"{path}.{name}".strip("."))


PLACES = [*paths(example_record()), "new", "companions.new", "flags.new"]
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=5)


def properties(schema, path=""):
    """(path, subschema with what it refers to) of every property, the conditions aside."""
    reference = schema.get("$ref", "").removeprefix("#/$defs/")
    schema = (load_schema()["$defs"][reference] if reference else {}) | schema
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from properties(inner, f"{path}.{name}".strip("."))


def test_the_schema_is_one_and_describes_every_property():
    schema = load_schema()
    Draft202012Validator.check_schema(schema)
    found = dict(properties(schema))
    assert len(found) > 150 and schema["properties"]["schema"]["const"] == VERSION
    for path, inner in found.items():
        assert len(inner["description"]) > 5 and inner["description"].endswith("."), path
        kinds = {inner["type"]} if isinstance(inner["type"], str) else set(inner["type"])
        if kinds & {"number", "integer"}:
            assert {"minimum", "exclusiveMinimum", "const"} & set(inner), path
        if "properties" in inner and path not in ("protocol", "environment", "environment.cpu"):
            assert inner["additionalProperties"] is False, path
        if "properties" in inner and path not in ("attempts", "environment.trained_on"):
            assert inner["required"] == list(inner["properties"]), path


def test_the_schema_knows_every_field_of_the_protocol():
    known = load_schema()["properties"]["protocol"]
    assert list(known["properties"]) == known["required"] == [field.name for field in dataclasses.fields(PROTOCOL)]


@pytest.mark.parametrize("record", [example_record(), diverged_record()])
def test_whole_records_fit(record):
    check(record)
    assert list(record) == list(load_schema()["properties"])
    assert upgrade(record) == record


def test_a_tuple_is_a_list():
    check(example_record(protocol=dataclasses.asdict(PROTOCOL)))


@pytest.mark.parametrize(
    "changes",
    [
        {"companions": None},  # of a record that was upgraded
        {"companions": COMPANIONS | {"against_retrain": None, "full": None}},
        {"companions": COMPANIONS | {"roc": None}},  # of version 2
        {"before": None},
        {"status": "untrained", "untrained_in": "pretrain"},
        {"status": "untrained", "untrained_in": "pretrain", **dict.fromkeys([*METRICS, "companions"])},
        {"curves": {"pretrain": None, "unlearn": {}, "evaluated": None}, "unlearn_steps": 0},
        {"attempts": {"pretrain": 0, "retrain": 5}, "rule_digest": None, "command": None},
        {"hyperparameters": {"anything": [1, {"at": None}]}, "unlearn_seed": 3},
    ],
)
def test_what_a_record_may_be(changes):
    check(example_record(**changes))


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("retain_acc", DROPPED, "it lacks 'retain_acc'"),
        ("retain_ac", 0.5, "it has an unknown key 'retain_ac': did you mean 'retain_acc'?"),
        ("\n\x1b[31m", 0.5, "it has an unknown key '\\n\\x1b[31m'"),
        ("schema", 1, "schema is 1: it must be 3"),
        ("seed", -1, "seed is -1: it must be at least 0"),
        ("seed", True, "seed is true: it must be a whole number"),
        ("unlearn_seed", 0.5, "unlearn_seed is 0.5: it must be a whole number"),
        ("retain_acc", "a" * 100, f'retain_acc is "{"a" * 59}...: it must be a number or null'),
        ("retain_acc", float("nan"), "retain_acc is NaN: it must be a number or null"),
        ("retain_acc", object(), "retain_acc is a object: it must be a number or null"),
        ("timing.data_s", float("inf"), "timing.data_s is Infinity: it must be a number or null"),
        ("retain_acc", None, "retain_acc is null: it must be a number, since status is ok"),
        ("forget_acc", None, "forget_acc is null: it must be a number, since retain_acc is not null"),
        ("forget_mia_auc", None, "forget_mia_auc is null: it must be a number, since there are companions"),
        ("companions.attacks.entropy", 1.3, "companions.attacks.entropy is 1.3: it must be at most 1"),
        ("companions.attacks.entropy", DROPPED, "companions.attacks lacks 'entropy'"),
        ("companions.attacks.entropi", 1, "companions.attacks has an unknown key 'entropi': did you mean 'entropy'?"),
        ("companions.class_acc.2", -0.1, "companions.class_acc[2] is -0.1: it must be at least 0"),
        ("companions.class_acc", [], "companions.class_acc has 0 values: it must have at least 2"),
        (
            "companions.histograms.members",
            [0] * 21,
            "companions.histograms.members has 21 values: it must have at most 20",
        ),
        ("companions.forgotten_as.test.1", 1.5, "companions.forgotten_as.test[1] is 1.5: it must be a whole number"),
        ("companions.mask_divergence", 0.7, "companions.mask_divergence is 0.7: it must be at most 0.6932"),
        ("companions.intervals.clean", 0.5, "companions.intervals.clean is 0.5: it must be a list"),
        ("companions.full.probe_excess", -1.1, "companions.full.probe_excess is -1.1: it must be at least -1"),
        ("companions.against_retrain", {}, "companions.against_retrain lacks 'seed'"),
        ("before.symmetric_score", 2, "before.symmetric_score is 2: it must be at most 1"),
        ("before.retain_acc", None, "before.forget_acc is 0.9: it must be null, since retain_acc is null"),
        ("before", [], "before is a list: it must be an object or null"),
        ("curves.unlearn.forget_loss.1", "x", 'curves.unlearn.forget_loss[1] is "x": it must be a number or null'),
        ("curves.unlearn", {"\n": [True]}, "curves.unlearn.\\n[0] is true: it must be a number or null"),
        ("flags.collapsed", 1, "flags.collapsed is 1: it must be true or false or null"),
        ("protocol.std.1", 0, "protocol.std[1] is 0: it must be more than 0"),
        ("protocol.adam_b1", 1, "protocol.adam_b1 is 1: it must be less than 1"),
        ("protocol.batch_size", DROPPED, "protocol lacks 'batch_size'"),
        ("rule_digest", "abc", 'rule_digest is "abc": it must be 64 hexadecimal digits'),
        ("finished_at", "today", 'finished_at is "today": it must be a date and time'),
        ("bench", "", 'bench is "": it must be a text that is not empty'),
        ("unlearn_steps", 2**53, f"unlearn_steps is {2**53}: it must be at most {2**53 - 1}"),
        ("status", "well", 'status is "well": it must be "ok" or "diverged" or "untrained"'),
        ("status", "diverged", "retain_acc is 0.9: it must be null, since status is diverged"),
        ("status", "untrained", "untrained_in is null: it must be a text, since status is untrained"),
        ("untrained_in", "retrain", 'untrained_in is "retrain": it must be null, since status is not untrained'),
        (
            "diverged_at",
            {"phase": "evaluate", "step": None},
            "diverged_at is an object: it must be null, since",
        ),
    ],
)
def test_each_fault_has_its_line(path, value, line):
    record = example_record()
    place(record, path, value)
    with pytest.raises(ValueError) as caught:
        check(record)
    assert str(caught.value).startswith(line) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*METRICS, "companions"])
def test_where_a_model_diverged_there_is_nothing(name):
    record = diverged_record(**{name: example_record()[name]})
    with pytest.raises(ValueError, match=r"since (status is diverged|retain_acc is null)"):
        check(record)


@pytest.mark.parametrize("record", [[], None, "text", 1.0])
def test_what_is_no_object_is_no_record(record):
    with pytest.raises(ValueError, match=r"^it is .*: it must be an object$"):
        check(record)


@fuzzed(100)
@given(place_=st.sampled_from(PLACES), value=VALUES | st.just(DROPPED), old=st.booleans())
def test_whatever_a_record_has_is_one_line(place_, value, old):
    record = example_record()
    try:
        place(record, place_, value)
    except KeyError:  # to be dropped, but never there
        return
    if old:
        record.pop("schema", None)
    try:
        check(upgrade(record))
    except ValueError as error:
        assert str(error) and str(error).isprintable()
