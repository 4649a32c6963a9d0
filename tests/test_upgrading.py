"""Records of earlier versions are read as ones of today's; newer ones are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from example_record import BEFORE, DROPPED, METRICS, PROTOCOL, example_record, place

from jaxunlearn.results.records import read
from jaxunlearn.results.schema import VERSION, check, load_schema, upgrade

RESULTS = Path(__file__).parent.parent / "results"
COMMITTED = sorted(RESULTS.glob("**/seed*.json"))
NEW = (
    "schema",
    "unlearn_seed",
    "forget_mia_auc_augmented",
    "companions",
    "curves",
    "scored",
    "flags",
    "rule_digest",
    "command",
)


def version_1(**changes):
    """A record as they were before they had a version."""
    record = {name: value for name, value in example_record().items() if name not in NEW} | {"collapsed": True}
    before = {name: value for name, value in BEFORE.items() if name not in NEW}
    timing = {name: value for name, value in record["timing"].items() if name not in ("companions_s", "prepare_s")}
    return record | {"before": before, "timing": timing} | changes


def contains(new, old):
    """Whether whatever an object has is in another too, at the same place."""
    if not isinstance(old, dict):
        return new == old
    return all(contains(new[name], value) for name, value in old.items())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS).with_suffix("")))
def test_committed_records_are_read(path):
    old, new = json.loads(path.read_text()), read(path)
    assert list(new) == list(load_schema()["properties"]) and new["schema"] == VERSION
    if old.get("schema") == VERSION:
        later = {"protocol": {"validation": False}, "environment": {"trained_on": {}}}
        assert new == old | {name: value | old[name] for name, value in later.items()}
    elif "schema" in old:
        assert contains(new, {name: value for name, value in old.items() if name != "schema"})
    else:
        assert new["flags"]["collapsed"] == old.pop("collapsed", None)
        assert contains(new, old)


def test_there_are_committed_records():
    assert len(COMMITTED) >= 28


def test_an_old_record_says_what_it_knew():
    old = version_1()
    kept = json.dumps(old)
    new = upgrade(old)
    check(new)
    assert json.dumps(old) == kept and upgrade(new) == new
    unknown = {"collapsed": True, "inverted_membership": None, "above_retrain": None, "output_mask": None}
    assert new == example_record(
        forget_mia_auc_augmented=None,
        companions=None,
        before=BEFORE | {"forget_mia_auc_augmented": None, "companions": None},
        curves={"pretrain": None, "unlearn": None, "evaluated": None},
        flags=unknown,
        rule_digest=None,
        command=None,
        timing=example_record()["timing"] | {"companions_s": None, "prepare_s": None},
    )


def test_a_record_of_version_2_says_what_it_knew():
    old = example_record(schema=2)
    for name in ("scored", "curves.evaluated", "companions.roc", "before.companions.roc"):
        place(old, name, DROPPED)
    kept = json.dumps(old)
    new = upgrade(old)
    check(new)
    assert json.dumps(old) == kept and list(new) == list(example_record())
    today = example_record()
    for name in ("curves.evaluated", "companions.roc", "before.companions.roc"):
        place(today, name, None)
    assert new == today and list(new["companions"]) == list(today["companions"])


@pytest.mark.parametrize("missing", ["curves", "before", "companions", "protocol", "curves.pretrain"])
def test_a_record_of_version_2_that_is_none(missing):
    old = example_record(schema=2)
    place(old, missing, DROPPED)
    with pytest.raises(ValueError, match=rf"lacks '{missing.split('.')[-1]}'$"):
        check(upgrade(old))


def test_the_oldest_records_knew_less():
    old = version_1()
    for name in ("collapsed", "dataset", "attempts", "untrained_in", "diverged_at", "before"):
        place(old, name, DROPPED)
    for name in ("timing.checkpoint_s", "environment.deterministic", "environment.cpu.compiled_kernels"):
        place(old, name, DROPPED)
    place(old, "environment.trained_on", DROPPED)
    for name in ("protocol.pretrain_schedule", "protocol.unlearn_augment"):
        place(old, name, DROPPED)
    new = upgrade(old)
    check(new)
    assert new["dataset"] == {"digest": None, "verified": None} and new["before"] is None and new["attempts"] == {}
    assert new["flags"]["collapsed"] is None and new["timing"]["checkpoint_s"] is None
    assert new["environment"]["trained_on"] == {}
    assert new["environment"]["deterministic"] is None and new["environment"]["cpu"]["compiled_kernels"] is None
    assert new["protocol"]["pretrain_schedule"] == "cosine" and new["protocol"]["unlearn_augment"] is True
    assert list(new["protocol"]) == [field.name for field in dataclasses.fields(PROTOCOL)]


def test_an_old_area_of_augmented_images_goes_where_it_belongs():
    protocol = example_record()["protocol"] | {"mia_augment": True}
    new = upgrade(version_1(protocol=protocol))
    check(new)
    for metrics in (new, new["before"]):
        assert (metrics["forget_mia_auc"], metrics["forget_mia_auc_augmented"]) == (None, METRICS["forget_mia_auc"])
        assert metrics["unlearn_score"] == METRICS["unlearn_score"]


def test_an_old_record_that_diverged():
    none = dict.fromkeys(name for name in METRICS if name not in NEW)
    check(upgrade(version_1(**none, status="diverged")))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"protocol": []}, "protocol is a list: it must be an object"),
        ({"environment": {"cpu": 1}}, "environment.versions is null: it must be an object"),
        ({"dataset": [], "before": 1}, "before is 1: it must be an object or null"),
        ({"kolapsed": True}, "it has an unknown key 'kolapsed'"),
        ({"retain_acc": 1.5}, "retain_acc is 1.5: it must be at most 1"),
    ],
)
def test_an_old_record_that_is_none(changes, line):
    with pytest.raises(ValueError) as caught:
        check(upgrade(version_1(**changes)))
    assert str(caught.value) == line


@pytest.mark.parametrize("version", [4, 10**30])
def test_a_newer_record_is_refused(version):
    with pytest.raises(ValueError, match=r"^written by a newer version of jaxunlearn: update it$"):
        upgrade({"schema": version, "what": "nobody knows"})


@pytest.mark.parametrize("version", ["3", None, 1, True])
def test_a_version_that_there_never_was(version):
    with pytest.raises(ValueError, match=r"^schema is .*: it must be 3$"):
        check(upgrade(example_record(schema=version)))
