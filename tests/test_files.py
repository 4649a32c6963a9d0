"""Files are written whole, and folders that cannot be written are known early."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.files import acquire, check_lockable, check_writable, make_lock, write_atomically


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_two_that_write_the_same_file_at_once_both_succeed(tmp_path, monkeypatch):
    fsync = os.fsync

    def write_another(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(tmp_path / "file", b"another")  # as of another thread
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_another)
    write_atomically(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_a_line_and_no_file_is_taken_for_a_lock(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=rf"^{tmp_path}/a is on a file system without locks: choose another$"):
        acquire(make_lock(tmp_path / "a" / "lock"), 0, "choose another")
    with pytest.raises(UserError, match=r"without locks: choose another$"):
        check_lockable(tmp_path / "b", "choose another")
    monkeypatch.undo()
    assert acquire(make_lock(tmp_path / "a" / "lock"), 0, "choose another")  # nothing of before stands in the way
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_locked_for_another_reason_is_a_line_too(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/locks cannot be locked \(Not a directory\): choose another$"):
        acquire(make_lock(tmp_path / "file" / "locks" / "lock"), 0, "choose another")


def test_a_lock_ends_with_its_process(tmp_path):
    own = make_lock(tmp_path / "lock")
    code = f"""
import pathlib
from jaxunlearn.files import make_lock
lock = make_lock(pathlib.Path({str(tmp_path / "lock")!r}))
lock.acquire()
print(flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        assert not acquire(own, 0, "")
        process.kill()
    assert acquire(own, 0, "")
    own.release()
