"""Ctrl-C and SIGTERM while a model trains: a run is asked to stop, saves itself, and stops."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Yields whether one of `SIGNALS` has come. Inside, the first changes nothing else; the next one acts as outside.

    Raises KeyboardInterrupt at the end where one has come.

    Signals that are ignored, as Ctrl-C is under nohup, stay so; in a thread that is not the main one, all do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    asked = False

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
    if asked:  # by a signal that came too late for whoever looks
        raise KeyboardInterrupt
