"""Where files go: written whole, in folders that are known early to be writable and lockable, and the cache folder."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from jaxunlearn.errors import UserError

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that have none
LOCK_REMEDY = "choose another --cache-dir"  # where what is to be locked is in the cache


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content`, making folders as needed: `path` holds the old file or the new one, whole, at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        without = error.errno in WITHOUT_LOCKS
        what = "is on a file system without locks" if without else f"cannot be locked ({os.strerror(error.errno or 0)})"
        raise UserError(f"{folder} {what}: {remedy}") from None
    return True


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
