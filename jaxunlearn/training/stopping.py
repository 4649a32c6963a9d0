"""Ctrl-C, SIGTERM and their like while a model trains: a run is asked to stop, saves itself, and stops."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

URGENT = (signal.SIGINT, signal.SIGTERM)
# A scheduler's, before a job's time is over, and a lost terminal's, which comes from the shell and from the system.
SIGNALS = (*URGENT, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Yields whether one of `SIGNALS` has come. Inside they change nothing else; a second `URGENT` one acts as outside.

    Raises KeyboardInterrupt at the end where one has come.

    Signals that are ignored, as SIGHUP is under nohup, stay so; in a thread that is not the main one, all do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # None is the handler of somebody who is not Python, and could not be put back.
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    asked = False

    def restore(numbers: Iterable[signal.Signals]) -> None:
        for number in before.keys() & numbers:
            signal.signal(number, before[number])

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if number in URGENT:
            restore(URGENT)

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore(SIGNALS)
    if asked:  # by a signal that came too late for whoever looks
        raise KeyboardInterrupt
