"""The restart happens once, keeps the command as it was, and leaves a user's own setting and own process alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxunlearn.devices.memory import KEEP

RESTART = """
import os, sys
from jaxunlearn.devices.memory import restart_with_memory_kept
print("start", flush=True)
restart_with_memory_kept()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.optimize)
"""
PLAIN = """
import sys
from jaxunlearn.devices.memory import plainly_started
print("plain" if plainly_started() else "not plain", sys.argv[1:])
"""


def start(*command, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = inherited | environment
    result = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return result.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
def test_restarts_once_with_the_same_command():
    printed = start("-O", "-c", RESTART, "a b", "--flag")
    assert printed == ["start", "start", f"{KEEP} ['a b', '--flag'] 1"]


def test_leaves_the_users_setting_alone():
    printed = start("-c", RESTART, GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert printed == ["start", "glibc.malloc.arena_max=2 [] 0"]


@pytest.mark.parametrize(
    ("before", "plain"),
    [
        ([], True),
        (["-u"], True),
        (["-OB", "-W", "ignore", "-Xutf8"], True),
        (["-i"], False),  # a shell afterwards, with what the script has made
        (["-m", "pdb", "-c", "continue", "-c", "quit"], False),
        (["-m", "cProfile"], False),
        (["-c", "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"], False),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_only_a_plain_start_may_be_restarted(tmp_path, before, plain):
    (tmp_path / "script.py").write_text(PLAIN)
    printed = start(*before, str(tmp_path / "script.py"), "a", "1")
    assert f"{'plain' if plain else 'not plain'} ['a', '1']" in printed


def test_the_package_as_a_module_is_a_plain_start(tmp_path):
    (tmp_path / "jaxunlearn").mkdir()  # in the package's place: what is started says how
    (tmp_path / "jaxunlearn" / "__main__.py").write_text(PLAIN)
    code = f"import jaxunlearn; jaxunlearn.__path__.insert(0, {str(tmp_path / 'jaxunlearn')!r})"
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    assert start("-m", "jaxunlearn", "-x", PYTHONPATH=path) == ["plain ['-x']"]


def test_a_script_from_stdin_is_not_started_again():
    options = {"input": PLAIN, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-"], **options).stdout.startswith("not plain")


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
@pytest.mark.parametrize("command", [["scripts/bench.py"], ["-m", "jaxunlearn", "bench"]])
def test_the_commands_keep_memory(tmp_path, command):
    probe = tmp_path / "probe.py"
    probe.write_text("import os\nraise SystemExit(os.environ.get('GLIBC_TUNABLES'))\n")
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    arguments = ["--bench", "resnet20-digits-class0", "--method", str(probe)]
    options = {"cwd": Path(__file__).parent.parent, "env": inherited, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command, *arguments], **options)
    assert done.returncode == 2 and KEEP in done.stderr
