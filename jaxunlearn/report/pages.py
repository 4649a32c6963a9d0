"""The page: one file of HTML, with its style, script and pictures inside, that needs no network."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.audit import showing
from jaxunlearn.data.datasets import Dataset
from jaxunlearn.data.sources import DATASETS
from jaxunlearn.errors import UserError, printable
from jaxunlearn.registry import RETRAIN
from jaxunlearn.report import plots, thumbnails
from jaxunlearn.report.drawing import inline_svg
from jaxunlearn.report.gathering import Found
from jaxunlearn.results import boards
from jaxunlearn.results.boards import Board
from jaxunlearn.results.rows import WORDS, grouped
from jaxunlearn.results.sheets import Cell, Estimate, text_of
from jaxunlearn.version import __version__

MARK = "jaxunlearn report"  # in a page's head: what may be overwritten
FIRST = ("rank", "method", "variant", "published")
BELOW = ("commands", "hardware")  # columns that stand in a row's details
TEXTS = ("method", "variant", "reads", "flags", "published")  # columns that are no numbers

Save = Callable[[Sequence[plots.Plot], str], Any]  # (plots, prefix of their names)


class Shown(NamedTuple):
    """A cell of a table: its text, and what it is sorted by."""

    text: str
    key: str
    link: str = ""  # the id of a row's details


class At(NamedTuple):
    """What is at hand beside the records."""

    paths: Mapping[str, Path]  # of records, by `_identity`
    pictures: Mapping[str, Dataset]  # data sets, by name
    save: Save  # what else becomes of plots

    def drawn(self, made: Sequence[plots.Plot], prefix: str) -> list[dict[str, Any]]:
        """Plots as parts of the page, in which ids begin with the prefix."""
        self.save(made, prefix)
        return [
            {"title": plot.title, "text": plot.text, "svg": _markup(inline_svg(plot, f"{prefix}-"))} for plot in made
        ]


def require_jinja2() -> None:
    """Raises UserError where jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError:
        raise UserError('the report needs jinja2: pip install -e ".[report]" (or pip install jinja2)') from None


def make_page(found: Found, pictures: Mapping[str, Dataset], save: Save = lambda made, prefix: None) -> str:
    """The HTML of everything that was found; `pictures` are data sets at hand, by name. `save` is given all plots, too.

    Raises:
      UserError: a package is missing.
    """
    require_jinja2()
    import jinja2

    files = resources.files("jaxunlearn.report")
    style, script = (files.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    at = At({_identity(record): path for path, record in found.records}, pictures, save)
    shown = [_board(board, at) for board in boards.boards([record for _, record in found.records])]
    times = sorted(record["finished_at"][:10] for _, record in found.records)
    return template.render(
        mark=MARK,
        version=__version__,
        style=_markup(style),
        script=_markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        boards=shown,
        audits=[_audit(board, at) for board in boards.boards(found.audits)],
        speeds=[_speed(record, at) for record in found.speeds],
        words=WORDS.values(),
        period=" to ".join(dict.fromkeys([times[0], times[-1]])) if times else "",
    )


def slug(bench: str, *parts: str, of: str = "") -> str:
    """A short id of [a-z0-9-] that is the same for the same texts and no others; it shows the parts but not `of`."""
    readable = re.sub(r"[^a-z0-9]+", "-", " ".join([bench, *parts]).lower()).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(repr([bench, parts, of]).encode()).hexdigest()[:6]}"


def _markup(text: str) -> Any:
    """Text of ours, which is markup."""
    from markupsafe import Markup

    return Markup(text)


def _board(board: Board, at: At) -> dict[str, Any]:
    sheet, runs = boards.results(board), boards.runs(board)
    filled = [name for name in sheet.rows[0] if any(text_of(name, row[name]) for row in sheet.rows)]
    columns = [name for name in FIRST if name in filled]
    columns += [name for name in filled if name not in (*FIRST, *BELOW)]
    rows = []
    for row in sheet.rows:
        key = (str(row["method"]), str(row["variant"]))
        known = row["published"] is None and key in runs
        link = _slug(board, *key) if known else ""
        kind = "published" if row["published"] else "reference" if row["rank"] == "ref" else "ours"
        rows.append({"kind": kind, "cells": [_shown(name, row[name], link) for name in columns]})
    return {
        "id": _slug(board),
        **{name: text_of(name, value) for name, value in board.about.items()},
        "columns": [{"name": name, "number": name not in TEXTS} for name in columns],
        "rows": rows,
        "notes": sheet.notes,
        "plots": at.drawn(plots.board_plots(board), _slug(board)),
        "runs": [_run(board, key, records, sheet.rows, _retrained(runs, records), at) for key, records in runs.items()],
    }


def _run(
    board: Board,
    key: tuple[str, str],
    records: Sequence[dict[str, Any]],
    rows: Sequence[Mapping[str, Cell]],
    retrained: Sequence[dict[str, Any]],
    at: At,
) -> dict[str, Any]:
    """A method's details: its records, the board's rows, and `retrain`'s records for what is drawn beside it."""
    own = _slug(board, *key)
    row = next(row for row in rows if row["published"] is None and (row["method"], row["variant"]) == key)
    first = next((record for record in records if record["status"] == "ok"), records[0])
    flags = text_of("flags", row["flags"])
    return {
        "id": own,
        "method": text_of("method", key[0]),
        "variant": key[1],
        "scores": [
            {"name": name, "text": text_of(name, row[name])}
            for name, cell in row.items()
            if isinstance(cell, Estimate) and name in ("retain_acc", "forget_acc", "forget_mia_auc", "symmetric_score")
        ],
        "flags": [{"word": word, "meaning": meaning} for word, meaning in WORDS.values() if word in flags],
        "reads": text_of("reads", row["reads"]),
        "hardware": text_of("hardware", row["hardware"]),
        "commands": [_command(command) for command in dict.fromkeys(r["command"] for r in records) if command],
        "settings": _pairs(first["hyperparameters"]),
        "protocol": _pairs(first["protocol"]),
        "versions": _versions(records),
        "digests": [printable(digest) for digest in dict.fromkeys(r["rule_digest"] for r in records) if digest],
        "seeds": [_seed(record) for record in records],
        "plots": at.drawn(plots.run_plots(records, retrained), own),
        "answers": _answers(first, at),
        "answers_seed": first["seed"],
    }


def _retrained(runs: Mapping[Any, Sequence[dict[str, Any]]], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    others = [record for several in runs.values() for record in several if record["method"] == RETRAIN]
    return [] if records[0]["method"] == RETRAIN else others


def _seed(record: Mapping[str, Any]) -> dict[str, str]:
    names = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score", "symmetric_score")
    values = {name: "" if record[name] is None else f"{record[name]:.4f}" for name in names}
    several = f" / {record['unlearn_seed']}" if record["unlearn_seed"] else ""
    return {
        "seed": f"{record['seed']}{several}",
        **values,
        "status": record["status"],
        "finished": record["finished_at"][:19],
    }


def _answers(record: Mapping[str, Any], at: At) -> dict[str, Any]:
    name = record["protocol"]["dataset"]
    classes = DATASETS[name].classes if name in DATASETS else ()
    path = at.paths.get(_identity(record))
    predictions = path.with_suffix(".npz") if path else None
    made = thumbnails.answers(record, predictions, at.pictures.get(name))
    titles = [classes[one.label] if one.label < len(classes) else f"class {one.label}" for one in made]
    shown = [
        {"title": title, "share": f"{one.share:.1%}", "pictures": one.pictures}
        for title, one in zip(titles, made, strict=True)
    ]
    return {"shown": shown if any(one.pictures for one in made) else [], "own": any(one.own for one in made)}


def _audit(board: Board, at: At) -> dict[str, Any]:
    """Audits of one benchmark and protocol; those of more models, or of other references, are tables of their own."""
    sets: dict[int, dict[str, list[dict[str, Any]]]] = {}  # by N and by what the references' attacks gave
    for record in board.records:
        references = json.dumps([record["attacks"][name] for name in ("pretrained", "retrained")], sort_keys=True)
        sets.setdefault(record["models"], {}).setdefault(references, []).append(record)
    parts = [
        _audit_part(board, models, number, alike, at)
        for models, found in sorted(sets.items())
        for number, alike in enumerate(found.values(), 1)
    ]
    return {
        "id": slug(board.bench, "audit", of=board.about["protocol"]),
        **{name: text_of(name, value) for name, value in board.about.items()},
        "columns": ["", *showing.SEPARATIONS, *showing.DISTANCES],
        "parts": parts,
    }


def _audit_part(board: Board, models: int, number: int, alike: list[dict[str, Any]], at: At) -> dict[str, Any]:
    """Audits by N models each that share their references: the `number`th such set."""
    heading = f"N = {models}" + (f", set {number} of originals and retrained models" if number > 1 else "")
    records = [
        max(several, key=lambda record: record["finished_at"]) | {"method": f"{method} {variant}".strip()}
        for (method, variant), several in grouped(alike, boards.defaults_of(alike)).items()
    ]
    own = slug(board.bench, "audit", f"N{models}", of=f"{board.about['protocol']} {number}")
    tables = []
    for statistic, title in showing.TITLES.items():
        rows = [[name, *showing.cells(attacks, statistic)] for name, attacks in showing.rows(records)]
        tables.append({"title": title, "rows": [[text_of("", cell) for cell in row] for row in rows]})
    notes = [printable(line) for line in showing.remarks(records, "±")]
    drawn = at.drawn(plots.audit_plots(records), own)
    return {"id": own, "heading": heading, "tables": tables, "notes": notes, "plots": drawn}


def _speed(record: dict[str, Any], at: At) -> dict[str, Any]:
    against, own = record["against"], slug(record["bench"], "speed", of=repr(record))
    rows = [
        [name, row["unit"], f"{row['ours']:.4g}", *([f"{row[against]:.4g}", f"{row['ratio']:.2f}"] if against else [])]
        for name, row in record["quantities"].items()
    ]
    device, seeds = record["environment"]["device_kind"], record["seeds"]
    several = f", {seeds} seeds" if seeds > 1 else ""
    columns = ["", "unit", "ours", *([str(against), "ratio"] if against else [])]
    return {
        "id": own,
        "title": printable(f"{record['bench']}, {record['precision']}, {device}{several}"),
        "columns": [printable(column) for column in columns],
        "rows": [[printable(cell) for cell in row] for row in rows],
        "plots": at.drawn(plots.speed_plots(record), own),
    }


def _slug(board: Board, *row: str) -> str:
    return slug(board.bench, *row, of=board.about["protocol"])


def _identity(record: Mapping[str, Any]) -> str:
    """What tells a record from others, whatever its method is called on the page."""
    names = ("bench", "rule_digest", "seed", "unlearn_seed", "protocol", "hyperparameters", "finished_at")
    return json.dumps([record[name] for name in names], sort_keys=True)


def _command(text: str) -> str:
    """One to copy; of a stranger's endless one as much as shows what it is, and that it is cut."""
    text = printable(text)
    return text if len(text) <= 5000 else f"# {text[:5000]} ..."


def _versions(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each package's versions, of all records."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record["environment"]["versions"].items():
            found.setdefault(name, {})[str(version)] = None
    return _pairs({name: ", ".join(versions) for name, versions in found.items()})


def _shown(name: str, cell: Cell, link: str) -> Shown:
    text = text_of(name, cell)
    key = cell.mean if isinstance(cell, Estimate) else cell
    return Shown(text, repr(key) if isinstance(key, int | float) else text, link if name == "method" else "")


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(printable(str(name))[:200], printable(str(value))[:200]) for name, value in values.items()]
