"""Reports and their plots as files: nothing that is not a report is overwritten."""

import os
from collections.abc import Iterable
from pathlib import Path

from jaxunlearn.errors import UserError, WriteError
from jaxunlearn.files import write_atomically
from jaxunlearn.report import drawing, pages, thumbnails
from jaxunlearn.report.gathering import Found, gather

HEAD = 4096  # bytes of a file in which a report says what it is


def check_report(path: Path) -> None:
    """Raises UserError where no report could be made at `path`: before hours of training."""
    drawing.require_matplotlib("the report")
    pages.require_jinja2()
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {os.strerror(error.errno or 0)}") from None
    if head and f'content="{pages.MARK} '.encode() not in head:
        raise UserError(f"{path} is no report and is not overwritten: choose another name")


def write_report(
    places: Iterable[Path], path: Path, data_dir: Path | None, cache_dir: Path, plots: Path | None = None
) -> list[str]:
    """`write_found` of the records in files and folders.

    Raises:
      UserError: also where there are none.
    """
    check_report(path)
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
    check_report(path)
    names = [record["protocol"]["dataset"] for _, record in found.records]
    pictures, unread = thumbnails.datasets(names, data_dir, cache_dir)
    try:
        write_atomically(path, pages.make_page(found, pictures).encode())
        for prefix, made in pages.all_plots(found) if plots else ():
            drawing.save(made, plots or Path(), prefix)
    except OSError as error:
        raise WriteError(f"cannot write the report {path}: {os.strerror(error.errno or 0)}") from None
    return [*found.refused, *unread]
