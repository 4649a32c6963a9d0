"""Files and archives, opened by what they hold: their names may be anything.

They come from the internet and are not trusted: archives are read in memory and never extracted, and sizes are bounded
before anything is read.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from jaxunlearn.errors import UserError, one_line

MAX_BYTES = 256 * 2**20  # of a file or an archive, decompressed; the largest official archive has 187 million bytes
MAX_NAME_BYTES = 8192  # of a header that gives the next member its name
SNIFFED_BYTES = 2**20  # of an archive, to know what is in it
GZIP = b"\x1f\x8b"
# How archives begin that are not read: zip, bzip2, xz, zstd, 7z, rar.
OTHER_KINDS = (b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")
REMEDY = "download it again"

_BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError)


class Blob(NamedTuple):
    """A file's contents, decompressed, and where they were read from."""

    where: str
    data: bytes


def published_name(name: str) -> str:
    """The name that a file was published under: without `.gz` and what browsers, copying and unpacking made of it."""
    name = re.sub(r" ?\(\d{1,3}\)| - Copy| copy", "", name)
    return re.sub(r"\.(idx[13]-ubyte)$", r"-\1", name.removesuffix(".gz"))


def read_file(path: Path) -> Blob:
    """A file as it is or, whatever its name, unzipped. UserError if it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            data = _unzipped(file).read(MAX_BYTES + 1)
    except _BROKEN as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {REMEDY}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES} bytes: it is not the official file, {REMEDY}")
    return Blob(str(path), data)


def read_archive(archive: Path, names: Sequence[str]) -> dict[str, Blob]:
    """The named files of a tar, zipped or not, in whatever folder inside it. UserError if one is missing or broken."""
    blobs: dict[str, Blob] = {}
    try:
        with archive.open("rb") as file:
            if file.read(8).startswith(OTHER_KINDS):
                raise UserError(f"{archive} is an archive of another kind than .tar and .tar.gz: unpack it")
            file.seek(0)
            for path, size, data in _files(_unzipped(file)):
                name = published_name(path.name)
                if name not in names or name in blobs:
                    continue
                if len(data) < size:
                    raise tarfile.ReadError(f"{path.name} is cut short")
                data = _unzipped(io.BytesIO(data)).read(MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise _TooLarge
                blobs[name] = Blob(f"{archive}: {name}", data)
                if len(blobs) == len(names):
                    return blobs
    except _TooLarge:
        raise UserError(f"{archive} holds more than {MAX_BYTES} bytes: {REMEDY}") from None
    except _BROKEN as error:
        raise UserError(f"{archive} cannot be read ({one_line(error)}): {REMEDY}") from error
    raise UserError(f"{archive} lacks {', '.join(sorted(set(names) - set(blobs)))}: {REMEDY}")


def names_in(archive: Path) -> set[str]:
    """The published names of the first files in a tar, as far as its first mebibyte goes; none if it is no tar."""
    start = io.BytesIO()
    names: set[str] = set()
    try:
        with archive.open("rb") as file:
            stream = _unzipped(file)
            if stream is file and not _is_header(file.read(tarfile.BLOCKSIZE)):
                return names
            stream.seek(0)
            while start.tell() < SNIFFED_BYTES and (piece := stream.read(2**16)):
                start.write(piece)
    except _BROKEN:  # what came before it may be enough
        pass
    start.seek(0)
    try:
        for path, _, _ in _files(start):
            names.add(published_name(path.name))
    except (_TooLarge, *_BROKEN):
        pass
    return names


class _TooLarge(Exception):
    pass


def _unzipped(file: IO[bytes]) -> IO[bytes]:
    zipped = file.read(len(GZIP)) == GZIP
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[return-value]


def _is_header(block: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except (tarfile.TarError, ValueError):
        return False


def _files(stream: IO[bytes]) -> Iterator[tuple[PurePosixPath, int, bytes]]:
    """(path, size, data) of each file in a tar; the data is shorter than the size where the stream ends early.

    Of the headers that extend others only names are understood, of the one member behind them, and short ones. tarfile
    itself, where it follows them, takes as much memory, time and stack as the file asks for.
    """
    longer = ""
    while (header := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        if stream.tell() + member.size > MAX_BYTES:
            raise _TooLarge
        data = stream.read(member.size)
        stream.read(-member.size % tarfile.BLOCKSIZE)
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield PurePosixPath(longer or member.name), member.size, data
        longer = _longer_name(member.type, data) if member.size <= MAX_NAME_BYTES else ""


def _longer_name(kind: bytes, data: bytes) -> str:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    found = re.search(rb"(?:^|\n)\d{1,9} path=([^\n]*)\n", data) if kind == tarfile.XHDTYPE else None
    return found[1].decode("utf-8", "surrogateescape") if found else ""
