"""The command: tables from records, anybody's, and in the files that have them."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from example_record import example_record
from fuzzing import damaged, fuzzed
from hypothesis import given
from test_boards import record
from test_gathering import GOOD, put

from jaxunlearn.commands.leaderboard import TABLES, updated
from jaxunlearn.commands.main import script
from jaxunlearn.errors import UserError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEND = "python scripts/leaderboard.py --update README.md docs/*.md"


@pytest.fixture
def leaderboard(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder: its status, and what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = script("leaderboard", [str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert not said.err or all(line.isprintable() for line in said.err.splitlines())
        return status, said.out, said.err

    return run


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_records(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert updated(text, path.name) == text, f"{path.name} is stale: {MEND}"
    assert capsys.readouterr().err == ""


def test_the_documents_have_tables():
    marks = [(ROOT / name).read_text().count("\n<!-- leaderboard: ") for name in ("README.md", "docs/results.md")]
    assert marks == [1, 4]


def test_a_changed_record_makes_a_document_stale(tmp_path, monkeypatch):
    put(tmp_path / "runs" / "seed0.json", example_record())
    monkeypatch.chdir(tmp_path)
    text = updated("<!-- leaderboard: --table short -->\n<!-- end -->\n", "x")
    assert updated(text, "x") == text and "| 0.9000 |" in text
    put(tmp_path / "runs" / "seed0.json", example_record(retain_acc=0.8))
    assert "| 0.8000 |" in updated(text, "x")


def test_every_table_in_every_format(leaderboard, tmp_path):
    for seed in range(3):
        put(tmp_path / "runs" / f"seed{seed}.json", record(seed=seed))
    for table in TABLES:
        kinds = [leaderboard("--table", table, "--format", kind) for kind in ("markdown", "csv", "json")]
        assert all((status, err) == (0, "") for status, _, err in kinds), table
        text, rows, values = (out for _, out, _ in kinds)
        rows, values = list(csv.DictReader(io.StringIO(rows))), json.loads(values)
        assert len(rows) == sum(len(one["rows"]) for one in values) == f"\n{text}".count("\n| ") - 2 * len(values), (
            table
        )


def test_a_folder_with_others_records_shows_what_is_good_and_names_the_rest(leaderboard, tmp_path):
    evil = "<script>|=cmd`\x1b[31m\n"
    hostile = example_record(method=evil, command=evil, hyperparameters={evil: evil})
    hostile["environment"]["device_kind"] = hostile["protocol"]["more"] = evil
    put(tmp_path / "runs" / "a" / "seed1.json", hostile)
    put(tmp_path / "runs" / "a" / "seed2.json", b"{")
    for kind in ("markdown", "csv", "json"):
        status, out, err = leaderboard("--format", kind)
        assert status == 0 and all(line.isprintable() for line in out.splitlines())
        assert err == "warning: cannot read the record runs/a/seed2.json: it is no JSON in line 1, column 2\n"
        assert kind == "json" or ("\x1b" not in out and "\n=" not in out and ",=" not in out)
    assert "<script>" not in leaderboard()[1].replace("$ <script>", "")


def test_seconds_that_no_sum_can_hold_are_no_record(leaderboard, tmp_path):
    endless = example_record()
    endless["timing"]["unlearn_s"] = 1.7e308
    put(tmp_path / "runs" / "seed0.json", endless)
    status, _, err = leaderboard()
    assert status == 2 and "timing.unlearn_s is 1.7e+308: it must be at most 10000000000" in err


def test_what_is_wrong_is_one_line(leaderboard, tmp_path):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "digits" / "seed0.json", example_record(bench="resnet20-digits-class0"))
    (tmp_path / "x.md").write_text("<!-- leaderboard: --table 'short -->\n<!-- end -->\n")
    (tmp_path / "y.md").write_text("<!-- leaderboard: --update x.md -->\n<!-- end -->\n")
    (tmp_path / "h.md").write_text("<!-- leaderboard: --help -->\n<!-- end -->\n")
    (tmp_path / "z.md").write_bytes(b"\xff")
    cases = {
        (): "runs: no such file or folder",
        ("empty",): "there are no records in empty: name folders of them, or run a benchmark first",
        ("digits", "--table", "published"): "nothing is published that these records can be compared with",
        ("digits", "--table", "rules"): "--table rules takes no records",
        ("digits", "--update", "x.md"): "--update takes no records, --table or --format",
        ("--update", "x.md", "--table", "short"): "--update takes no records, --table or --format",
        ("--update", "x.md", "--format", "csv"): "--update takes no records, --table or --format",
        ("--update", "x.md"): "x.md, line 1: '--table 'short': No closing quotation",
        ("--update", "y.md"): "y.md, line 1: --update cannot stand in a file that is updated",
        ("--update", "h.md"): "h.md, line 1: ",
        ("--update", "z.md"): "cannot read z.md: not a text",
        ("--update", "nowhere.md"): "cannot read nowhere.md: No such file or directory",
    }
    for arguments, said in cases.items():
        status, out, err = leaderboard(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {said}"), (arguments, err)


def test_update_writes_what_has_changed_and_nothing_where_anything_is_wrong(leaderboard, tmp_path):
    put(tmp_path / "runs" / "seed0.json", example_record())
    good = "<!-- leaderboard: --table short -->\n<!-- end -->\n"
    for name, text in {"a.md": good, "b.md": "no table\n", "c.md": good.replace("short", "shrot")}.items():
        (tmp_path / name).write_text(text)
    status, out, err = leaderboard("--update", "a.md", "b.md", "c.md")
    assert (status, out) == (2, "") and "c.md, line 1: argument --table: invalid choice" in err
    assert (tmp_path / "a.md").read_text() == good
    assert leaderboard("--update", "a.md", "b.md") == (0, "updated a.md\n", "")
    assert "scrub" in (tmp_path / "a.md").read_text()
    assert leaderboard("--update", "a.md", "b.md") == (0, "", "")


def test_update_leaves_a_link_a_link(leaderboard, tmp_path):
    put(tmp_path / "runs" / "seed0.json", example_record())
    page = put(tmp_path / "elsewhere" / "a.md", b"<!-- leaderboard: --table short -->\n<!-- end -->\n")
    (tmp_path / "a.md").symlink_to(page)
    assert leaderboard("--update", "a.md") == (0, "updated a.md\n", "")
    assert (tmp_path / "a.md").is_symlink() and "scrub" in page.read_text()


def test_a_terminal_without_unicode_gets_escapes(tmp_path, monkeypatch):
    for seed in range(2):
        put(tmp_path / "runs" / f"seed{seed}.json", example_record(seed=seed))
    monkeypatch.chdir(tmp_path)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert script("leaderboard", ["runs"]) == 0
    stream.seek(0)
    assert "0.9000 \\xb1 0.0000" in stream.read()


def test_whoever_stops_reading_ends_nothing(tmp_path, monkeypatch):
    put(tmp_path / "runs" / "seed0.json", example_record())
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert script("leaderboard", ["runs"]) == 0


@fuzzed(40)
@given(content=damaged(GOOD))
def test_damaged_records_break_no_table(tmp_path_factory, content):
    path = put(tmp_path_factory.getbasetemp() / "board" / "seed0.json", content)
    for table in TABLES[:4]:
        try:
            made = updated(f"<!-- leaderboard: {path} --table {table} -->\n<!-- end -->\n", "x")
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert all(line.isprintable() for line in made.splitlines())
