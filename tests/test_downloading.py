"""Downloads against a server that is slow, cuts off, forgets ranges, and has other files."""

import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from layouts import load, small_sets, write_archive, write_binaries, write_fmnist

from jaxunlearn.data import datasets, downloading
from jaxunlearn.data.downloading import File, registered
from jaxunlearn.errors import UserError

CONTENT = os.urandom(300_000)


class Server(ThreadingHTTPServer):
    """Serves `content`, or a file's of `files`, as the next of `manners` says; keeps what was asked for in `ranges`."""

    daemon_threads = True
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.manners: list[str] = []
        self.ranges: list[str | None] = []
        self.released = threading.Event()

    @property
    def file(self):
        url = f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"
        return File(url, len(self.content), hashlib.sha256(self.content).hexdigest())


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        manner = server.manners.pop(0) if server.manners else "well"
        body = server.files.get(self.path[1:], server.content)
        start = int(asked[6:-1]) if asked and manner != "no ranges" else 0
        if manner.isdecimal():
            self.send_error(int(manner))
            return
        if "page" in manner:
            body, start = b"<html>log in first</html>", 0
        if manner == "other":
            body = bytes(len(body))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if manner not in ("endless", "unsaid page"):
            self.send_header("Content-Length", str(len(body) - start))
        if manner == "zipped":
            self.send_header("Content-Encoding", "gzip")  # as some servers say of .gz
        self.end_headers()
        if manner in ("cut", "stall"):
            self.wfile.write(body[start : start + 2 * downloading.PIECE])
            self.wfile.flush()
            if manner == "stall":
                server.released.wait(30)
        elif manner == "endless":
            self.wfile.write(body + b"more")
        else:
            self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr(downloading, "registered", lambda name: [server.file])
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def download(folder):
    downloading.download("cifar10", folder, "or else", progress=False)
    (path,) = (path for path in folder.iterdir() if path.suffix != ".lock")
    return path


def refused(folder):
    with pytest.raises(UserError) as caught:
        download(folder)
    message = str(caught.value)
    assert message.startswith("downloading cifar10 failed (") and message.endswith("): try again, or else")
    assert not (folder / "cifar-10-binary.tar.gz").exists()
    return message


@pytest.mark.parametrize(
    ("manners", "ranges"),
    [
        ([], [None]),
        (["zipped"], [None]),
        (["cut"], [None, "bytes=131072-"]),
        (["cut", "cut"], [None, "bytes=131072-", "bytes=262144-"]),
        (["cut", "503", "well"], [None, "bytes=131072-", "bytes=131072-"]),
        (["cut", "no ranges"], [None, "bytes=131072-"]),
        (["503", "429", "500"], [None] * 4),
        (["unsaid page"], [None, "bytes=25-", None]),  # what was kept of the page is thrown away
        (["cut", "416"], [None, "bytes=131072-", None]),
    ],
)
def test_a_download_goes_on_until_it_is_whole(manners, ranges, server, tmp_path):
    server.manners += manners
    path = download(tmp_path / "new")
    assert path.name == "cifar-10-binary.tar.gz" and path.read_bytes() == CONTENT
    assert server.ranges == ranges


def test_a_server_that_falls_silent_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", (5.0, 0.1))
    server.manners += ["stall"]
    assert download(tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=131072-"]


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("404", "answers 404"),
        ("page", "has 25 bytes where 300000 are registered"),
        ("other", "its SHA-256 differs"),
        ("endless", "more than the 300000 bytes"),
        ("unsaid page", "the connection ended early"),
        ("503", "503"),
    ],
)
def test_wrong_answers_are_one_line(manner, says, server, tmp_path):
    server.manners += [manner] * 9
    message = refused(tmp_path)
    assert says in message and server.file.url in message


def test_a_later_call_goes_on_where_one_was_cut(server, tmp_path):
    server.manners += ["cut"] + ["503"] * downloading.TRIES
    assert "503" in refused(tmp_path)
    assert [path.name for path in tmp_path.glob("cifar*")] == ["cifar-10-binary.tar.gz.part"]
    server.ranges.clear()
    assert download(tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=131072-"]
    server.manners += ["404"]
    assert download(tmp_path).read_bytes() == CONTENT  # it is there: nothing is asked for


@pytest.mark.parametrize("left", [b"of another file", bytes(400_000)])
def test_what_does_not_belong_to_the_file_is_not_gone_on_with(left, server, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(left)
    assert download(tmp_path).read_bytes() == CONTENT


@pytest.fixture
def small_cifar(server, tmp_path, monkeypatch):
    """The folder of a small CIFAR-10, whose archive the server has."""
    folder = write_binaries(tmp_path / "away" / "cifar-10-batches-bin", "cifar10")
    write_archive(folder, tmp_path / "away" / "a.tgz")
    monkeypatch.setattr(server, "content", (tmp_path / "away" / "a.tgz").read_bytes())
    return folder


@small_sets
@pytest.mark.usefixtures("small_cifar")
def test_a_file_that_was_damaged_later_is_moved_aside_and_fetched_again(server, tmp_path):
    first = datasets.load("cifar10", None, tmp_path / "cache", progress=False)
    archive = tmp_path / "cache" / "data" / "cifar-10-binary.tar.gz"
    archive.write_bytes(server.content[:999])
    with pytest.warns(UserWarning, match=rf"{archive} is not the registered file: moved to {archive.name}\.damaged-"):
        again = datasets.load("cifar10", None, tmp_path / "cache", progress=False)
    assert (again.digest, again.source) == (first.digest, str(archive)) and len(server.ranges) == 2
    (aside,) = archive.parent.glob("*.damaged-*")
    assert aside.read_bytes() == server.content[:999]


def test_nobody_there_and_no_room_are_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"downloading cifar10 failed \(FileExistsError: .*try again, or else"):
        downloading.download("cifar10", tmp_path / "file", "or else", progress=False)
    monkeypatch.setattr(downloading, "registered", lambda name: [File("http://127.0.0.1:9/a.gz", 3, "")])
    assert "http://127.0.0.1:9/a.gz: ConnectionError" in refused(tmp_path / "new")


def test_a_second_process_waits_and_says_so(server, tmp_path):
    held = threading.Event()

    def other():
        with FileLock(tmp_path / ".cifar10.lock"):
            held.set()
            time.sleep(0.1)
            (tmp_path / "cifar-10-binary.tar.gz").write_bytes(CONTENT)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    with pytest.warns(UserWarning, match="another process downloads to"):
        download(tmp_path)
    thread.join()
    assert server.ranges == []


def test_progress_is_shown_on_stderr_alone(server, tmp_path, capsys):
    downloading.download("cifar10", tmp_path / "a", "", progress=True)
    out, err = capsys.readouterr()
    assert "cifar-10-binary.tar.gz" in err and not out
    downloading.download("cifar10", tmp_path / "b", "", progress=False)
    assert capsys.readouterr() == ("", "")


@small_sets
def test_a_data_set_that_no_place_has_is_downloaded_and_read(server, small_cifar, tmp_path):
    found = datasets.load("cifar10", None, tmp_path / "cache", progress=False)
    assert found.source == str(tmp_path / "cache" / "data" / "cifar-10-binary.tar.gz")
    assert found.digest == load("cifar10", small_cifar).digest
    assert datasets.load("cifar10", None, tmp_path / "cache").digest == found.digest and len(server.ranges) == 1


@small_sets
def test_a_download_of_several_files_goes_on_where_it_ended_between_two(server, tmp_path, monkeypatch):
    folder = write_fmnist(tmp_path / "away", zipped=True)
    server.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    address = server.file.url.rpartition("/")[0]
    files = [
        File(f"{address}/{name}", len(content), hashlib.sha256(content).hexdigest())
        for name, content in server.files.items()
    ]
    monkeypatch.setattr(downloading, "registered", lambda name: files)
    server.manners += ["well", "404"]
    with pytest.raises(UserError, match="answers 404"):
        datasets.load("fashion_mnist", None, tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache" / "data").glob("*.gz"))) == 1
    assert datasets.find("fashion_mnist", None, tmp_path / "cache") is None
    found = datasets.load("fashion_mnist", None, tmp_path / "cache", progress=False)
    assert found.digest == load("fashion_mnist", folder).digest and len(server.ranges) == 5


def test_a_failed_download_says_where_else_the_files_may_be_put(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    server.manners += ["404"]
    with pytest.raises(UserError) as caught:
        datasets.load("cifar10", None, tmp_path / "cache")
    message = str(caught.value)
    for part in ("cifar-10-python.tar.gz", str(tmp_path / "cache" / "data"), str(tmp_path / "cache" / "tfds")):
        assert part in message
    assert f"looked in: {tmp_path} is empty" in message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_what_is_registered_are_forms_that_are_read(name):
    files = registered(name)
    layouts = datasets.DATASETS[name].layouts
    wanted = [{layout.archive} for layout in layouts] + [{f"{file}.gz" for file in layouts[0].names}]
    assert {file.name for file in files} in wanted
    assert all(len(file.sha256) == 64 and file.size > 1000 and file.url.startswith("http") for file in files)
