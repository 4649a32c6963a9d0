"""Records of others: each is read or named, in a line."""

import errno
import json
import os

import pytest
from example_record import diverged_record, example_record
from fuzzing import damaged, fuzzed
from hypothesis import given

from jaxunlearn.errors import UserError
from jaxunlearn.results.gathering import gather

GOOD = json.dumps(example_record()).encode()


def put(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    return path


def test_a_folder_has_its_records_at_any_depth_and_a_file_is_one_whatever_its_name(tmp_path):
    put(tmp_path / "a" / "b" / "c" / "seed1.json", example_record(seed=1))
    put(tmp_path / "a" / "seed0-unlearn1.json", example_record(seed=0, unlearn_seed=1))
    put(tmp_path / "a" / "speed.json", b"no record, and no name of one")
    other = put(tmp_path / "mine", example_record(seed=7))
    found, refused = gather([tmp_path / "a", other, other])
    assert [(record["seed"], record["unlearn_seed"]) for record in found] == [(0, 1), (1, 0), (7, 0)]
    assert refused == []


def test_what_is_no_record_is_a_line_and_costs_the_others_nothing(tmp_path):
    put(tmp_path / "seed0.json", example_record(seed=0))
    put(tmp_path / "seed1.json", b"\x1b[2J{")
    put(tmp_path / "seed2.json", example_record(seed=2, retain_acc=7))
    put(tmp_path / "seed3.json", example_record(seed=3, bench="mine\n\x1b[31m" + "x" * 500))
    put(tmp_path / "seed4.json", GOOD + b" " * 2**24)
    (tmp_path / "seed5.json").mkdir()
    (tmp_path / "seed6.json").symlink_to("/dev/zero")
    found, refused = gather([tmp_path])
    assert [record["seed"] for record in found] == [0]
    said = [
        "it is no JSON in line 1",
        "retain_acc is 7",
        "there is no benchmark 'mine\\n\\x1b[31mxxx",
        "too large",
        "no such file",
    ]
    assert len(refused) == 5 and all(word in line for word, line in zip(said, refused, strict=True))
    assert all(line.isprintable() and f"seed{i}" in line for i, line in zip((1, 2, 3, 4, 6), refused, strict=True))
    assert max(map(len, refused)) < 400


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a" / "seed0.json", example_record())
    put(tmp_path / "b" / "seed1.json", example_record(seed=1))
    scandir = os.scandir

    def denied(folder):
        if os.fspath(folder) == str(tmp_path / "a"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    found, refused = gather([tmp_path])
    assert [record["seed"] for record in found] == [1]
    assert refused == [f"left out {tmp_path / 'a'}: Permission denied"]


def test_a_run_counts_once(tmp_path):
    first = put(tmp_path / "a" / "seed0.json", example_record(finished_at="2026-01-01T00:00:00"))
    later = {"finished_at": "2026-02-01T00:00:00", "rule_digest": "0" * 64, "retain_acc": 0.5}
    again = put(tmp_path / "b" / "seed0.json", example_record(**later))
    put(tmp_path / "c" / "seed0.json", example_record(hyperparameters={"temperature": 2.0}))
    images = {"digest": "0" * 16, "verified": False}
    put(tmp_path / "f" / "seed0.json", example_record(dataset=images))
    for name, digest in (("d", "d" * 64), ("e", "e" * 64)):  # rules of others, of one name
        put(tmp_path / name / "seed0.json", example_record(method="mine", rule_digest=digest))
    found, refused = gather([tmp_path])
    assert [(record["method"], record["retain_acc"]) for record in found] == [
        *[("scrub", 0.9)] * 2,
        *[("mine", 0.9)] * 2,
        ("scrub", 0.9),
    ]
    assert refused == [f"left out {again}: the same run as {first}"]


def test_of_the_same_run_the_record_that_knows_more_is_taken(tmp_path):
    first = put(tmp_path / "a" / "seed0.json", example_record(companions=None))
    lost = put(tmp_path / "b" / "seed0.json", diverged_record())
    most = put(tmp_path / "c" / "seed0.json", example_record())
    found, refused = gather([tmp_path])
    assert [record["companions"] is not None for record in found] == [True]
    assert refused == [f"left out {lost}: the same run as {first}", f"left out {first}: the same run as {most}"]


def test_a_place_that_does_not_exist_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        gather([tmp_path / "nowhere"])


@fuzzed(60)
@given(content=damaged(GOOD))
def test_damaged_records_are_read_or_named(tmp_path_factory, content):
    path = put(tmp_path_factory.getbasetemp() / "gathered" / "seed0.json", content)
    found, refused = gather([path])
    assert len(found) + len(refused) == 1 and all(line.isprintable() for line in refused)
