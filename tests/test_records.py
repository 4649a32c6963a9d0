import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from example_record import diverged_record, example_record
from fuzzing import damaged, fuzzed, outcome
from hypothesis import given

from jaxunlearn.errors import UserError
from jaxunlearn.results import environment as environment_module
from jaxunlearn.results import records
from jaxunlearn.results.environment import environment
from jaxunlearn.results.schema import VERSION

GOOD = json.dumps(example_record()).encode()


def make(status="ok", epochs=80, temperature=4.0, **more):
    record = (example_record if status == "ok" else diverged_record)(hyperparameters={"temperature": temperature})
    record["protocol"] |= {"pretrain_epochs": epochs, "mean": (0.4914, 0.4822, 0.4465)}
    return record | more


def images(verified):
    return {"digest": "c257da322a0d649b", "verified": verified}


def without(name):
    """A record of a shorter run: without one of the companions that take longer."""
    record = make()
    return record | {"companions": record["companions"] | {name: None}}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def check(path, record, force=False):
    records.check_overwrite(path, record["protocol"], record["hyperparameters"], force)


@pytest.fixture
def path(tmp_path):
    return records.record_path(tmp_path / "runs", "bench", "scrub", 42, {})


def test_record_path():
    out = Path("runs")
    assert records.record_path(out, "bench", "scrub", 42, {}) == out / "bench" / "scrub" / "seed42.json"
    one = records.record_path(out, "bench", "scrub", 42, {"temperature": 2.0, "mean": (1, 2)})
    assert re.fullmatch(r"scrub-[0-9a-f]{8}", one.parent.name)
    assert one == records.record_path(out, "bench", "scrub", 42, {"mean": [1, 2], "temperature": 2.0})
    assert one != records.record_path(out, "bench", "scrub", 42, {"mean": [1, 2], "temperature": 3.0})


def test_record_path_of_a_further_unlearning():
    names = [records.record_path(Path(), "bench", "scrub", 42, {}, unlearn_seed=j).name for j in (0, 3)]
    assert names == ["seed42.json", "seed42-unlearn3.json"]


def test_record_path_hash_is_stable():
    # A contract: another value would orphan the records that users have. This is sha256 of {"pretrain_epochs":2}.
    assert records.record_path(Path(), "b", "m", 0, {"pretrain_epochs": 2}).parent.name == "m-b9c69cfd"


def test_write_creates_the_folder_and_keeps_the_order(path):
    record = make(hyperparameters={"b": 1.0, "a": None})
    check(path, record)
    assert not path.parent.parent.exists()  # checking leaves nothing behind
    assert records.write(path, record, force=False)
    text = path.read_text()
    assert text.endswith("}\n") and text.startswith('{\n  "schema": 3,\n')
    assert list(json.loads(text)) == list(record) and list(json.loads(text)["hyperparameters"]) == ["b", "a"]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("old", "new", "written"),
    [
        (make(), make(), True),
        (make("diverged"), make("ok"), True),
        (make("diverged"), make("diverged"), True),
        (make("ok"), make("diverged"), False),
        (make(epochs=2), make(), False),
        (make(dataset=images(True)), make(dataset=images(False)), False),
        (make(dataset=images(False)), make(dataset=images(True)), True),
        (make(dataset=images(None)), make(dataset=images(False)), True),
        ({**make(), "dataset": None}, make(dataset=images(False)), True),  # does not fit: no reason to keep it
        (make(temperature=2.0), make(), False),
        (make(), without("full"), False),  # what took longer is not lost to a shorter run
        (make(), without("against_retrain"), False),
        (without("full"), make(), True),
        (make("diverged"), without("full"), True),
    ],
)
def test_overwriting(path, old, new, written):
    put(path, old)
    assert records.write(path, new | {"command": "second"}, force=False) is written
    assert (json.loads(path.read_text())["command"] == "second") is written
    assert records.write(path, new | {"command": "third"}, force=True)
    assert json.loads(path.read_text())["command"] == "third"


def test_a_record_of_version_1_is_compared_as_it_was_written(path):
    old = {"status": "ok", "protocol": make()["protocol"], "hyperparameters": {"temperature": 4.0}}
    put(path, old)
    check(path, make())
    del old["protocol"]["unlearn_augment"]
    put(path, old)
    with pytest.raises(UserError, match="unlearn_augment: absent there, true here"):
        check(path, make())
    assert not records.write(path, make(), force=False)


def test_a_record_from_before_there_was_validation_is_of_the_same_settings(path):
    old = make()
    put(path, old | {"protocol": {name: value for name, value in old["protocol"].items() if name != "validation"}})
    check(path, make())
    assert records.read(path) == json.loads(json.dumps(old))
    other = old["protocol"] | {"validation": True}
    with pytest.raises(UserError, match="validation: false there, true here"):
        check(path, old | {"protocol": other})


def test_a_hyperparameter_that_a_rule_was_given_later_is_at_its_default(path):
    old = make()
    assert old["method"] == "scrub" and "gamma" not in old["hyperparameters"]
    put(path, old)
    check(path, old | {"hyperparameters": {"temperature": 4.0, "gamma": 0.99}})
    with pytest.raises(UserError, match=r"\(gamma: 0.99 there, 0.5 here\)"):
        check(path, old | {"hyperparameters": {"temperature": 4.0, "gamma": 0.5}})


def test_other_images_that_are_not_the_official_ones_are_refused_early(path):
    put(path, make(dataset={"digest": "a" * 16, "verified": False}))
    for digest, verified, force in (("a" * 16, False, False), ("b" * 16, True, False), ("b" * 16, False, True)):
        records.check_images(path, digest, verified, force)
    with pytest.raises(UserError, match="holds a result of other images: pass --force to replace it, or another --out"):
        records.check_images(path, "b" * 16, verified=False, force=False)
    put(path, {**make(), "dataset": None})  # of before there was a digest
    records.check_images(path, "b" * 16, verified=False, force=False)
    records.check_images(path.with_name("none.json"), "b" * 16, verified=False, force=False)


def test_an_edited_rule_of_a_users_replaces_what_it_was_before(path):
    put(path, make() | {"method": "mine", "rule_digest": "a" * 64})
    shorter = without("full") | {"method": "mine", "rule_digest": "a" * 64}
    assert not records.write(path, shorter, force=False)
    assert records.write(path, shorter | {"rule_digest": "b" * 64}, force=False)


def test_check_overwrite_names_what_differs(path):
    records.write(path, make("diverged"), force=False)
    check(path, make())  # tuples become lists on disk: still the same protocol
    differing = [(make(epochs=2), "pretrain_epochs: 80 there, 2 here"), (make(temperature=2.0), "temperature: 4.0")]
    for new, difference in differing:
        with pytest.raises(UserError) as caught:
            check(path, new)
        message = str(caught.value)
        assert difference in message and str(path) in message and "--force" in message and "\n" not in message
        check(path, new, force=True)


@pytest.mark.parametrize("key", ["protocol", "hyperparameters"])
def test_settings_that_only_one_side_has(path, key):
    old = make()
    old[key] = old[key] | {"gone": 1}
    records.write(path, old, force=False)
    with pytest.raises(UserError, match="gone: 1 there, absent here"):
        check(path, make())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no JSON in line 1, column 1"),
        (b'{"protocol"', "it is no JSON in line 1, column 12"),
        (b'{"a":\n\n\n nan}', "it is no JSON in line 4, column 2"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b"[]", "it is not a result record"),
        (GOOD.replace(b"0.9", b"NaN", 1), "NaN is not a finite number"),
        (GOOD.replace(b"0.9", b"-Infinity", 1), "-Infinity is not a finite number"),
        (GOOD.replace(b"0.9", b"1e999", 1), "1e999 is not a finite number"),
        (GOOD.replace(b"42", b"9" * 5000, 1), "it has a number of 5000 digits"),
        (GOOD.replace(b"forget_acc", b"retain_acc", 1), "it has 'retain_acc' twice"),
        (GOOD.replace(b"0.9", b"[" * 100 + b"]" * 100, 1), "it is nested too deeply for a record"),
        (b"[" * 100_000, "it is nested too deeply for a record"),
        (GOOD + b" " * records.LARGEST, "it is too large for a record"),
        (GOOD.replace(b'"schema": 3', b'"schema": 4', 1), "written by a newer version of jaxunlearn: update it"),
    ],
    ids=range(14),
)
def test_unreadable_record_is_kept(path, content, reason):
    put(path, content)
    for call in (lambda: check(path, make()), lambda: records.write(path, make(), force=False)):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == f"cannot read the record {path} ({reason}): pass --force to replace it"
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert str(caught.value) == f"cannot read the record {path}: {reason}"
    assert path.read_bytes() == content
    check(path, make(), force=True)
    assert records.write(path, make(), force=True)


@pytest.mark.parametrize("content", [{}, {"status": "ok"}, {"status": "ok", "protocol": {}, "hyperparameters": []}])
def test_what_is_no_record_is_kept(path, content):
    put(path, content)
    for call in (lambda: check(path, make()), lambda: records.write(path, make(), force=False)):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == f"{path} is not a result record: pass --force to replace it"
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_no_nan_on_disk(path, value):
    records.write(path, make(), force=False)
    before = path.read_text()
    with pytest.raises((ValueError, TypeError)):
        records.write(path, make(retain_acc=value), force=True)
    assert path.read_text() == before


@pytest.mark.parametrize("changes", [{"schema": 1}, {"retain_acc": 1.5}, {"retain_ac": 1}, {"before": {}}])
def test_what_does_not_fit_is_not_written(path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        records.write(path, make(**changes), force=True)
    assert not path.exists()


def test_what_is_written_is_read(path):
    for unlearn_seed, record in enumerate([make(), make("diverged")]):
        place = path.with_stem(f"seed42-unlearn{unlearn_seed}")
        records.write(place, record, force=False)
        assert records.read(place) == json.loads(json.dumps(record))


def test_what_does_not_fit_is_not_read(path):
    put(path, make(retain_acc=1.5))
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert str(caught.value) == f"cannot read the record {path}: retain_acc is 1.5: it must be at most 1"
    check(path, make())  # but it stops no run that would make a better one


@pytest.mark.parametrize("name", ["nowhere.json", "", "a\0b", "x" * 5000])
def test_where_there_is_no_file(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        records.read(tmp_path / name)


@fuzzed(150)
@given(content=damaged(GOOD))
def test_damaged_records(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    put(path, content)
    record = outcome(records.read, path)
    assert record is None or record["schema"] == VERSION
    outcome(check, path, make())


def test_environment():
    found = environment()
    assert list(found) == ["versions", "device_kind", "device_count", "deterministic", "cpu", "git_commit"]
    assert found["versions"]["jax"] and found["versions"]["python"].startswith("3.")
    assert found["cpu"]["model"] and found["cpu"]["cores"] >= 1 and found["device_count"] >= 1
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_commit"])
    assert str(Path.home()) not in json.dumps(found)


def test_git_commit(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    try:
        git("init")
    except OSError:
        pytest.skip("no git")
    tracked, stray = tmp_path / "a.py", tmp_path / "b.py"
    tracked.touch()
    stray.touch()
    git("add", "a.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "commit", "-m", "a")
    git("tag", "v1")
    assert re.fullmatch(r"[0-9a-f]{40}", environment_module._git_commit(tracked))
    assert environment_module._git_commit(stray) is None
    tracked.write_text("x = 1\n")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", environment_module._git_commit(tracked))
    monkeypatch.setenv("PATH", "")
    assert environment_module._git_commit(tracked) is None
