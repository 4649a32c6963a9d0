"""Tables as Markdown, CSV and JSON. Their text comes from anybody's files: none of it is markup, formula or control."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from jaxunlearn.errors import printable

LONGEST = 500  # characters of a text
LONGER = {"commands": 20_000}  # by column; a thousand seeds are named in half of that, and cut off they are others
# What begins emphasis, code or a link; underscores inside a word do not. Addresses are links as they are.
MARKUP = re.compile(r"[\\`*\[\]~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=www)\.|@", re.IGNORECASE)
DIGITS = {"seconds": 1}  # decimals of a column's fractions, if not four


class Estimate(NamedTuple):
    """A mean over seeds; half the width of its interval is None where there is one."""

    mean: float
    half_width: float | None


Cell = str | int | float | Sequence[str] | Estimate | None  # None, and no texts: nothing is known


class Sheet(NamedTuple):
    """One table. Several of one kind have the same columns."""

    about: Mapping[str, str]  # what all rows are of: the heading; in CSV the first columns
    rows: Sequence[Mapping[str, Cell]]
    notes: Sequence[str] = ()  # what is to be known to read it; not in CSV
    below: str = ""  # the column that stands below the table in Markdown, each of its texts once: commands


def to_markdown(sheets: Sequence[Sheet]) -> str:
    """A heading, a table without the columns that are empty, then notes and commands, of each sheet."""
    return "\n\n".join("\n\n".join(_blocks(sheet)) for sheet in sheets) + "\n"


def to_csv(sheets: Sequence[Sheet]) -> str:
    """All rows below one another. The half width of an interval is a column of its own."""
    text = io.StringIO()
    rows = [{**sheet.about, **_flat(row)} for sheet in sheets for row in sheet.rows]
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(text_of(name, cell)) for name, cell in row.items()} for row in rows)
    return text.getvalue()


def to_json(sheets: Sequence[Sheet]) -> str:
    """A list of objects: what a sheet is about, its `rows` and `notes`. Values as they are; an Estimate an object."""
    made = [
        {**sheet.about, "rows": [{name: _value(cell) for name, cell in row.items()} for row in sheet.rows]}
        | {"notes": list(sheet.notes)}
        for sheet in sheets
    ]
    return json.dumps(made, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {"markdown": to_markdown, "csv": to_csv, "json": to_json}


def _blocks(sheet: Sheet) -> list[str]:
    blocks = []
    if sheet.about:
        first, *rest = map(_marked, sheet.about.values())
        blocks.append(f"**{first}**: {', '.join(rest)}")
    columns = {name: [text_of(name, row[name]) for row in sheet.rows] for name in sheet.rows[0]}
    shown = {name: cells for name, cells in columns.items() if any(cells) and name != sheet.below}
    cells = [list(shown), ["---"] * len(shown), *(map(_marked, row) for row in zip(*shown.values(), strict=True))]
    blocks.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    blocks += sheet.notes
    if sheet.below:
        texts = dict.fromkeys(text for row in sheet.rows for text in _texts(sheet.below, row[sheet.below]))
        # No text begins a line, so none can end the block.
        lines = ["```console", *(f"$ {text}" for text in texts), "```"]
        blocks += ["\n".join(lines)] if texts else []
    return blocks


def text_of(name: str, cell: Cell) -> str:
    """What stands in a column's cell: one line, without markup's escapes; empty where nothing is known."""
    digits = DIGITS.get(name, 4)
    if isinstance(cell, Estimate):
        width = "" if cell.half_width is None else f" ± {cell.half_width:.{digits}f}"
        return f"{cell.mean:.{digits}f}{width}"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return "; ".join(_texts(name, cell))


def _texts(name: str, cell: Cell) -> list[str]:
    """What a column's cell without decimals says; nothing where nothing is known."""
    longest = LONGER.get(name, LONGEST)
    if cell is None or isinstance(cell, str | int | float):
        return [] if cell in (None, "") else [_plain(str(cell), longest)]
    return [_plain(str(one), longest) for one in cell]


def _plain(text: str, longest: int = LONGEST) -> str:
    text = printable(text)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _marked(text: str) -> str:
    """The text as Markdown that shows it: nothing in it is markup, a link or HTML, or ends a cell."""
    return MARKUP.sub(r"\\\g<0>", escape(_plain(text), quote=False).replace("|", "&#124;"))


def _inert(text: str) -> str:
    """A text that no spreadsheet takes for a formula; a number is one still."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _is_number(text) else text


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) is not None


def _flat(row: Mapping[str, Cell]) -> dict[str, Cell]:
    flat: dict[str, Cell] = {}
    for name, cell in row.items():
        flat[name] = cell.mean if isinstance(cell, Estimate) else cell
        if isinstance(cell, Estimate):
            flat[f"{name}_half_width"] = cell.half_width
    return flat


def _value(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return cell._asdict()
    return cell if cell is None or isinstance(cell, str | int | float) else list(cell)
