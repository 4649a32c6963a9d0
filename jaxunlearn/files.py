"""Where files go: written whole, in folders that are known early to be writable and lockable, and the cache folder; and
whose code a file holds."""

import errno
import os
import resource
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from jaxunlearn.errors import UserError, WriteError, one_line

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that have none
TOO_MANY = (errno.EMFILE, errno.ENFILE)
# What says nothing of a file: read again it may be whole.
PASSING = (*TOO_MANY, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EINTR)
STANDARD_LIBRARY = str(Path(os.__file__).parent)
INSTALLED = ("/site-packages/", "/dist-packages/")
AGAIN = "put that right and run the same command, which goes on from here"
LOCK_REMEDY = "choose another --cache-dir"  # where what is to be locked is in the cache


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content`, making folders as needed: `path` holds the old file or the new one, whole, at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system. Threads, and containers that share the
    # folder, have the same process id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Gives what is damaged a name beside its own, under which nothing looks for it. Returns that."""
    return path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))


@contextmanager
def writing(what: object, remedy: str = "") -> Iterator[None]:
    """Raises WriteError, in one line that ends in `remedy`, where `what` cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {what} ({one_line(error)}){remedy and ': '}{remedy}") from error


def default_cache() -> Path:
    """`jaxunlearn` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxunlearn"


def make_lock(path: Path) -> BaseFileLock:
    """A lock on the file `path` that the system takes back when the process ends, however that ends.

    Without that filelock would make do with a file that is there while the lock is held, and stays after a kill.
    """
    return FileLock(path, fallback_to_soft=False)


def acquire(lock: BaseFileLock, seconds: float, remedy: str) -> bool:
    """Whether `lock` is held now, for which it waits so long, -1 being for ever. Makes its folder as needed.

    Raises UserError, which ends in `remedy`, where the folder's files cannot be locked.
    """
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except OSError as error:
        if error.errno in TOO_MANY:
            raise UserError("too many open files: raise `ulimit -n`, or take fewer seeds or methods at once") from None
        without = error.errno in WITHOUT_LOCKS
        what = "is on a file system without locks" if without else f"cannot be locked ({os.strerror(error.errno or 0)})"
        raise UserError(f"{folder} {what}: {remedy}") from None
    return True


def open_many_files() -> None:
    """Lets this process have as many files open as the system allows any."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where there is no limit, some systems take none
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def passes(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, says nothing of the file that could not be read."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_writable(folder: Path) -> None:
    """Raises UserError where files cannot be made in `folder`, existing or not. Leaves nothing behind."""
    with _trial(folder):
        pass


def check_lockable(folder: Path, remedy: str) -> None:
    """Raises UserError as `acquire` does where files in `folder`, existing or not, cannot be locked. Leaves nothing."""
    with _trial(folder) as inside:
        lock = make_lock(inside / "lock")
        acquire(lock, 0, remedy)
        lock.release()


@contextmanager
def _trial(folder: Path) -> Iterator[Path]:
    """A new folder, gone afterwards, where `folder` is or would be. Raises UserError where it cannot be made."""
    try:
        # A link to nowhere exists too: no folder can be made in its place.
        ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if exists(path))
        made = tempfile.TemporaryDirectory(dir=ancestor)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {os.strerror(error.errno or 0)}; choose another folder") from None
    with made as name:
        yield Path(name)


def exists(path: Path) -> bool:
    """Whether there is something, be it a link to nowhere. Raises OSError where there cannot be, as of a long name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
    return True


def is_of_others(file: str) -> bool:
    """Whether the code in a file is the standard library's or an installed package's, or made by one."""
    return file.startswith((STANDARD_LIBRARY, "<@", "<frozen")) or any(part in file for part in INSTALLED)
