"""Where files go: written whole, in folders that are known early to be writable, and the cache folder."""

import errno
import os
import tempfile
from pathlib import Path

from jaxunlearn.errors import UserError


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


def check_writable(folder: Path) -> None:
    """Raises UserError where files cannot be made in `folder`, existing or not. Leaves nothing behind."""
    try:
        # A link to nowhere exists too: no folder can be made in its place.
        ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if exists(path))
        with tempfile.TemporaryDirectory(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {os.strerror(error.errno or 0)}; choose another folder") from None


def exists(path: Path) -> bool:
    """Whether there is something, be it a link to nowhere. Raises OSError where there cannot be, as of a long name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
    return True
