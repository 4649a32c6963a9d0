"""What anybody wrote into a record is shown, and is neither markup nor formula nor control."""

import csv
import io
import json
import re

import pytest

from jaxunlearn.results.sheets import LONGEST, Estimate, Sheet, to_csv, to_json, to_markdown

HOSTILE = [
    "a|b",
    "a\\|b",
    "<img src=x onerror=alert(1)>",
    "<!-- end -->",
    "`x` **y** __z__ _w_ ~~v~~",
    "[link](https://evil.example) www.evil.example a@evil.example",
    "line\n```\n| - |\r\n\x1b[31m\x00\u202e",
    "&lt;b&gt;",
]


def cells_of(line):
    """A row's cells, as GitHub splits them: at each bar without a backslash."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup(text):
    made = to_markdown([Sheet({"bench": text, "protocol": text}, [{"method": text, "other": 1}])])
    heading, _, *lines = made.splitlines()
    assert len(lines) == 3 and all(len(cells_of(line)) == 2 for line in lines) and made.isprintable() is False
    assert all(line.isprintable() for line in made.splitlines())
    for part in (heading.removeprefix("**").replace("**: ", " ", 1), cells_of(lines[2])[0]):
        assert not re.search(r"[<>]|(?<!\\)[`*\[\]~]|(?<!\\)@|[^\\]://|[wW]{3}\.", part)
        assert not re.search(r"(?<![0-9A-Za-z\\])_|(?<!\\)_(?![0-9A-Za-z])", part)
        assert "&" not in re.sub(r"&(amp|lt|gt|#124);", "", part)


def test_names_stay_as_they_are():
    row = {"rule": "bad_teacher reset_bn=True", "value": 0.5, "list": ["retain", "forget images"], "none": None}
    made = to_markdown([Sheet({}, [row])])
    assert made.splitlines() == [
        "| rule | value | list |",
        "| --- | --- | --- |",
        "| bad_teacher reset_bn=True | 0.5000 | retain; forget images |",
    ]


def test_commands_stand_below_in_a_block_that_they_cannot_end():
    rows = [{"method": "a", "commands": ["run `x`\n```\n# big", "run y"]}, {"method": "b", "commands": ["run y"]}]
    made = to_markdown([Sheet({"bench": "x"}, rows, ["A note."], below="commands")])
    assert made.endswith("\n\nA note.\n\n```console\n$ run `x`\\n```\\n# big\n$ run y\n```\n")
    assert "commands" not in made
    assert "console" not in to_markdown([Sheet({"bench": "x"}, [{"method": "a", "commands": []}], below="commands")])


def test_estimates_are_one_cell_in_markdown_and_two_columns_in_csv():
    rows = [{"method": "a", "acc": Estimate(0.5, 0.01), "seconds": 12.34}, {"method": "b", "acc": Estimate(0.25, None)}]
    rows[1]["seconds"] = None
    sheets = [Sheet({"bench": "x"}, rows)]
    assert "| a | 0.5000 ± 0.0100 | 12.3 |" in to_markdown(sheets) and "| b | 0.2500 |  |" in to_markdown(sheets)
    assert list(csv.DictReader(io.StringIO(to_csv(sheets)))) == [
        {"bench": "x", "method": "a", "acc": "0.5000", "acc_half_width": "0.0100", "seconds": "12.3"},
        {"bench": "x", "method": "b", "acc": "0.2500", "acc_half_width": "", "seconds": ""},
    ]
    (made,) = json.loads(to_json(sheets))
    assert made["rows"][0] == {"method": "a", "acc": {"mean": 0.5, "half_width": 0.01}, "seconds": 12.34}


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-", "=\n1"])
def test_no_text_is_a_formula(text):
    made = to_csv([Sheet({"bench": text}, [{"method": text, "list": [text, "b"]}])])
    (row,) = csv.DictReader(io.StringIO(made))
    assert all(cell[0] in "'\\" for cell in row.values()) and "\t" not in made and "\r" not in made


def test_numbers_stay_numbers():
    (row,) = csv.DictReader(io.StringIO(to_csv([Sheet({}, [{"difference": -0.03, "count": -1}])])))
    assert row == {"difference": "-0.0300", "count": "-1"}


def test_no_text_is_longer_than_a_reader_can_bear():
    sheets = [Sheet({"bench": "x"}, [{"method": "y" * 10**6}])]
    assert len(to_markdown(sheets)) < LONGEST + 100 and len(to_csv(sheets)) < LONGEST + 100


def test_a_command_is_whole():
    command = f"jaxunlearn bench --seeds {','.join(map(str, range(0, 2000, 2)))}"
    sheets = [Sheet({"bench": "x"}, [{"method": "y", "commands": (command,)}], below="commands")]
    assert f"$ {command}\n" in to_markdown(sheets) and command in to_csv(sheets)
