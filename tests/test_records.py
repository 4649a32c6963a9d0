import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.results import environment as environment_module
from jaxunlearn.results import records
from jaxunlearn.results.environment import environment

PROTOCOL = {"pretrain_epochs": 80, "mean": (0.4914, 0.4822, 0.4465)}


def make(status="ok", epochs=80, temperature=4.0, **more):
    protocol = PROTOCOL | {"pretrain_epochs": epochs}
    settings = {"protocol": protocol, "hyperparameters": {"temperature": temperature}}
    return {"method": "scrub", **settings, "status": status, **more}


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


def test_record_path_hash_is_stable():
    # A contract: another value would orphan the records that users have. This is sha256 of {"pretrain_epochs":2}.
    assert records.record_path(Path(), "b", "m", 0, {"pretrain_epochs": 2}).parent.name == "m-b9c69cfd"


def test_write_creates_the_folder_and_keeps_the_order(path):
    record = make(retain_acc=0.5, before={"b": 1.0, "a": None})
    check(path, record)
    assert not path.parent.parent.exists()  # checking leaves nothing behind
    assert records.write(path, record, force=False)
    text = path.read_text()
    assert text.endswith("}\n") and text.startswith('{\n  "method": "scrub",\n')
    assert list(json.loads(text)) == list(record)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("old", "new", "written"),
    [
        (make(), make(), True),
        (make("diverged"), make("ok"), True),
        (make("diverged"), make("diverged"), True),
        (make("ok"), make("diverged"), False),
        (make(epochs=2), make(), False),
        (make(dataset={"verified": True}), make(dataset={"verified": False}), False),
        (make(dataset={"verified": False}), make(dataset={"verified": True}), True),
        (make(), make(dataset={"verified": False}), True),  # older records do not say
        (make(temperature=2.0), make(), False),
    ],
)
def test_overwriting(path, old, new, written):
    records.write(path, old, force=False)
    assert records.write(path, new | {"run": 2}, force=False) is written
    assert ("run" in json.loads(path.read_text())) is written
    assert records.write(path, new | {"run": 3}, force=True)
    assert json.loads(path.read_text())["run"] == 3


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


@pytest.mark.parametrize("content", [b"", b'{"protocol"', b"\xff\xfe", b"[]", b'{"status": "ok"}', b'{"a":\n\n\n nan}'])
def test_unreadable_record_is_kept(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for call in (lambda: check(path, make()), lambda: records.write(path, make(), force=False)):
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert str(path) in message and "--force" in message and "\n" not in message
    assert path.read_bytes() == content
    check(path, make(), force=True)
    assert records.write(path, make(), force=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_no_nan_on_disk(path, value):
    records.write(path, make(), force=False)
    before = path.read_text()
    with pytest.raises((ValueError, TypeError)):
        records.write(path, make(retain_acc=value), force=True)
    assert path.read_text() == before


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
