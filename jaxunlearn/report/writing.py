"""Reports and their plots as files: nothing that is not a report is overwritten."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError
from jaxunlearn.files import check_writable, write_atomically, writing
from jaxunlearn.report import drawing, pages, thumbnails
from jaxunlearn.report.drawing import Plot
from jaxunlearn.report.gathering import Found, gather
from jaxunlearn.runs.request import Request

HEAD = 4096  # bytes of a file in which a report says what it is


def check_report(path: Path, plots: Path | None = None) -> None:
    """Raises UserError where no report could be made at `path`, and no plots in `plots`: before hours of training."""
    drawing.require_matplotlib("the report")
    pages.require_jinja2()
    check_writable(path.parent)
    if plots:
        check_writable(plots)
    try:
        if os.path.exists(path) and not (os.path.isfile(path) and _is_report(path)):
            raise UserError(f"{path} is no report and is not overwritten: choose another name")
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {os.strerror(error.errno or 0)}") from None


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return f'content="{pages.MARK} '.encode() in file.read(HEAD)


def write_report(
    places: Iterable[Path], path: Path, data_dir: Path | None, cache_dir: Path, plots: Path | None = None
) -> list[str]:
    """`write_found` of the records in files and folders.

    Raises:
      UserError: also where there are none.
    """
    check_report(path, plots)
    places = list(places)
    found = gather(places)
    if not (found.records or found.audits or found.speeds):
        names = ", ".join(map(str, places))
        raise UserError(f"there are no records in {names}: name folders of them, or run a benchmark first")
    return write_found(found, path, data_dir, cache_dir, plots)


def write_found(
    found: Found, path: Path, data_dir: Path | None, cache_dir: Path, plots: Path | None = None
) -> list[str]:
    """Makes a report of records, and each of its plots as PNG and SVG below `plots`.

    Args:
      data_dir: where images may be, as of `jaxunlearn.data.datasets.find`; nothing is downloaded.

    Returns:
      A line for everything that was left out.

    Raises:
      UserError: a package is missing, or `path` has something else.
      WriteError: a file cannot be written.
    """
    check_report(path, plots)
    names = [record["protocol"]["dataset"] for _, record in found.records]
    pictures, unread = thumbnails.datasets(names, data_dir, cache_dir)

    def save(made: Sequence[Plot], prefix: str) -> None:
        if plots:
            with writing(plots):
                drawing.save(made, plots, prefix)

    page = pages.make_page(found, pictures, save)
    with writing(path):
        write_atomically(path.resolve(), page.encode())  # of a link, what it leads to
    return [*found.refused, *unread]


def write_run(request: Request, records: Iterable[dict[str, Any]], path: Path) -> list[str]:
    """`write_found` of the records that a run has just made."""
    found = Found.of_runs((request.path_of(record), record) for record in records)
    return write_found(found, path, request.data_dir, request.cache_dir)
