"""Runs the arms of a check as processes: some import and trace, one at a time compiles and measures."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxunlearn.gpu_check.arms import Arm

COMMAND = (sys.executable, "-m", "jaxunlearn.gpu_check.measuring")
WORKERS = 3  # arms under way: one measures, the others are got ready
LEAST = 10.0  # seconds before the deadline: what has not begun is not begun
TURN = "JAXUNLEARN_CHECK_TURN"  # in an arm's environment: the file to lock for its turn
TURN_TAKEN = "measuring"  # the line that says so
FATAL = re.compile(r"F\d{4} ")  # begins the line in which XLA's log says why
COMMON = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}


def run_arms(
    arms: Sequence[Arm], deadline: float, tell: Callable[[dict[str, Any]], None], options: Sequence[str] = ()
) -> None:
    """Runs the arms in their order, `deadline` seconds in all, and tells each result as it comes.

    A result is {"arm", "seconds"} and what the arm printed: one line, of some arms several; or, beside "arm", "error":
    why there is none; or "skipped": it did not fit. `options` go to every arm.
    """
    start, queue, guard = time.monotonic(), list(arms), threading.Lock()
    running: set[subprocess.Popen[str]] = set()
    stopped = False

    def one(turn: Path) -> Iterator[dict[str, Any]]:
        with guard:
            if stopped or not queue:
                return
            arm = queue.pop(0)
        left = deadline - (time.monotonic() - start)
        if left < LEAST:
            yield {"arm": arm.name, "skipped": "the deadline was near"}
            return
        begun = time.monotonic()
        for result in _run(arm, left, turn, options, running):
            yield {"arm": arm.name, "seconds": round(time.monotonic() - begun, 1)} | result

    def work(turn: Path) -> None:
        while queue and not stopped:
            for result in one(turn):
                with guard:
                    tell(result)

    with tempfile.TemporaryDirectory() as folder:
        workers = [threading.Thread(target=work, args=(Path(folder) / "turn",)) for _ in range(WORKERS)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:  # after Ctrl-C too, which reaches only this process
            stopped = True
            while any(worker.is_alive() for worker in workers):  # one may have been about to start a process
                for process in list(running):
                    _kill(process)
                time.sleep(0.05)


def _run(
    arm: Arm, left: float, turn: Path, options: Sequence[str], running: set[subprocess.Popen[str]]
) -> Iterator[dict[str, Any]]:
    """The lines of an arm's process, and an error where it did not end well."""
    root = str(Path(__file__).parent.parent.parent)  # so that a checkout measures itself
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | COMMON | {TURN: str(turn), "PYTHONPATH": path} | arm.environment
    command = [*COMMAND, *options, *arm.words]
    cut: list[str] = []

    def cut_off(why: str) -> None:
        cut.append(why)
        _kill(process)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        running.add(process)
        timers = [threading.Timer(left, cut_off, ["the deadline came"])]
        timers[0].start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip() == TURN_TAKEN:
                    timers.append(threading.Timer(arm.limit, cut_off, [f"it took more than {arm.limit:g} s"]))
                    timers[-1].start()
                elif line.startswith("{"):
                    yield json.loads(line)
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            _kill(process)
            process.wait()
            process.stdout.close()
            running.discard(process)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [""]
            # Where XLA gave up, a stack of calls follows.
            line = next((line for line in said if FATAL.match(line)), said[-1])
            yield {"error": cut[0] if cut else f"status {process.returncode}: {line[-300:]}"}


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
