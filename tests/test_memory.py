"""The restart happens once, keeps the command as it was, and leaves a user's own setting alone."""

import os
import subprocess
import sys

import pytest

from jaxunlearn.devices.memory import KEEP

SCRIPT = """
import os, sys
from jaxunlearn.devices.memory import restart_with_memory_kept
print("start", flush=True)
restart_with_memory_kept()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.optimize)
"""


def start(**environment):
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-O", "-c", SCRIPT, "a b", "--flag"]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
def test_restarts_once_with_the_same_command():
    assert start() == ["start", "start", f"{KEEP} ['a b', '--flag'] 1"]


def test_leaves_the_users_setting_alone():
    assert start(GLIBC_TUNABLES="glibc.malloc.arena_max=2") == [
        "start",
        "glibc.malloc.arena_max=2 ['a b', '--flag'] 1",
    ]
