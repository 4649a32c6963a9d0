"""Downloads the official files of a data set, whose addresses and checksums tensorflow-datasets registers.

Its own download manager starts again from nothing after a cut.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxunlearn.errors import UserError, one_line
from jaxunlearn.files import LOCK_REMEDY, acquire, make_lock, set_aside

TIMEOUT = 10.0, 30.0  # seconds without a connection, without a byte
TRIES = 4  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second; the next are longer
PIECE = 2**16  # bytes


class File(NamedTuple):
    """A registered file."""

    url: str
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        """Its published name."""
        return self.url.rpartition("/")[2]


def registered(name: str) -> list[File]:
    """The files of a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds  # seconds to import
    from tensorflow_datasets.core.download.checksums import load_url_infos

    infos = load_url_infos(tfds.core.tfds_path(f"url_checksums/{name}.txt"))
    return [File(url, int(info.size), info.checksum) for url, info in infos.items()]


def download(name: str, folder: Path, advice: str, progress: bool) -> None:
    """Downloads a data set's files into `folder`; `progress` is shown on stderr.

    A file appears whole and with its registered SHA-256, or not at all. What a cut or a stop left in `*.part` is gone
    on with; another file of the same name is moved aside, with a warning. Several processes that want the same files
    download them once. UserError, ending in `advice`, if it fails.
    """
    try:
        files = registered(name)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(_lock(name, folder)), _bar(progress) as advance:
            for file in files:
                target = folder / file.name
                if target.exists() and _sha256(target) != file.sha256:
                    aside = set_aside(target)
                    warnings.warn(f"{target} is not the registered file: moved to {aside.name}", stacklevel=3)
                if not target.exists():  # else another process was faster
                    _fetch(file, target, advance)
    except Exception as error:  # network, disk, checksum: each has its own kinds
        reason = error if isinstance(error, UserError) else one_line(error)
        raise UserError(f"downloading {name} failed ({reason}): try again, {advice}") from error


def begun(name: str, folder: Path) -> bool:
    """Whether a data set has ever been downloaded into `folder`, if not to the end."""
    return _lock(name, folder).exists()


def _lock(name: str, folder: Path) -> Path:
    return folder / f".{name}.lock"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = make_lock(path)
    if not acquire(lock, 0, LOCK_REMEDY):
        warnings.warn(f"another process downloads to {path.parent}: waiting for it to finish", stacklevel=5)
        acquire(lock, -1, LOCK_REMEDY)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[File, int], None]]:
    """Yields a function of a file and how many bytes of it there are."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()
    tasks = {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:

        def advance(file: File, done: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file.name, total=file.size)
            bar.update(tasks[file], completed=done)

        yield advance


def _fetch(file: File, target: Path, advance: Callable[[File, int], None]) -> None:
    part = target.with_name(f"{target.name}.part")
    pieced = _fill(file, part, advance)
    if pieced and _sha256(part) != file.sha256:  # not all of them were of the same file
        part.unlink()
        _fill(file, part, advance)
    if _sha256(part) != file.sha256:
        part.unlink()
        raise UserError(f"what {file.url} has is not the registered file: its SHA-256 differs")
    os.replace(part, target)


def _fill(file: File, part: Path, advance: Callable[[File, int], None]) -> bool:
    """Downloads until `part` has the registered size, from where it ends, as often as that brings something.

    Returns whether it may be of several pieces.
    """
    import requests
    from urllib3.exceptions import HTTPError

    failed, pieced = 0, _size(part) > 0
    while (before := _size(part)) != file.size:
        pieced |= before > 0
        try:
            _download_once(file, part, advance)
            reason = "the connection ended early"
        except (requests.RequestException, HTTPError) as error:
            reason = one_line(error)
        failed = 0 if _size(part) > before else failed + 1
        if failed == TRIES:
            raise UserError(f"{file.url}: {reason}")
        time.sleep(PAUSE * failed)
    return pieced


def _download_once(file: File, part: Path, advance: Callable[[File, int], None]) -> None:
    import requests

    done = _size(part) if _size(part) < file.size else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:
            part.unlink()
            return
        if 400 <= answer.status_code < 500 and answer.status_code != 429:
            raise UserError(f"{file.url} answers {answer.status_code}")
        answer.raise_for_status()
        goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        done = done if goes_on else 0
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and done + int(length) != file.size:
            raise UserError(f"{file.url} has {done + int(length)} bytes where {file.size} are registered")
        with part.open("ab" if goes_on else "wb") as out:
            for piece in answer.raw.stream(PIECE, decode_content=False):
                out.write(piece)
                done += len(piece)
                if done > file.size:
                    raise UserError(f"{file.url} has more than the {file.size} bytes that are registered")
                advance(file, done)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
