"""What is said on stderr of work that takes long: bars on a terminal, elsewhere now and then a line."""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 1.0  # how often a value is read from the device
LINE_SECONDS = 60.0, 600.0  # between two lines of a log: first, and at most, for each wait is twice the one before it
LONG_SECONDS = 600.0  # what takes longer says so once it has run for so many steps and seconds
MEASURED = 20, 30.0

# (steps of the epoch that are done, metrics [S, steps] of the last ones, ready)
Report = Callable[[int, dict[str, Any]], None]


class Reporter:
    """Shows one bar at a time, or writes lines where stderr is no terminal. `quiet` says nothing."""

    def __init__(self, quiet: bool = False, advice: str = ""):
        """`advice` ends the line that says that a run is long, before anything is trained."""
        self.shows = not quiet and sys.stderr.isatty()
        self._quiet = quiet
        self._later: float | None = None  # images that are still to be trained on after a task; None: nobody knows
        self._whole, self._times = 0.0, 1
        self._advice, self._advises = advice, False
        self._estimated: list[str] = []  # one line, said once; shared by copies

    def before(self, images: float, whole: float = 0.0, advise: bool = False) -> "Reporter":
        """One for a task after which so many images are trained on, of a run's `whole`.

        It says how long all takes, if that is long.
        """
        other = copy.copy(self)
        other._later, other._whole, other._advises = images, whole, advise
        return other

    def repeated(self, times: int) -> "Reporter":
        """One for the first of so many runs that take equally long."""
        other = copy.copy(self)
        other._times = times
        return other

    @contextmanager
    def task(
        self, title: str, epochs: int, steps: int, images: int, first: int = 0
    ) -> Iterator[Callable[[int], Report]]:
        """A bar over `epochs` epochs of `steps` steps and `images` images each, of which `first` steps are done. What
        goes before them, in epochs below 0, does not move it.

        Yields a function of the epoch that makes the loop's `report`.
        """
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),  # names come from users
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not self.shows, transient=True) as bar:
            shown = bar.add_task(title, total=epochs * steps, completed=first, text="compiling")
            last, wait = time.monotonic(), REFRESH_SECONDS if self.shows else LINE_SECONDS[0]
            start: tuple[float, int] | None = None  # where speed is measured from: what came before was compilation
            in_pieces: int | None = None  # the epoch of the first report, where that was of many steps at once

            def show(text: str, completed: int | None = None) -> None:
                nonlocal wait
                if self.shows:
                    bar.update(shown, text=text, completed=completed)
                else:
                    say(f"{title}: {text}")
                    wait = min(2 * wait, LINE_SECONDS[1])

            def say(line: str) -> None:
                bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

            def of_epoch(epoch: int) -> Report:
                def report(done: int, metrics: dict[str, Any]) -> None:
                    nonlocal last, start, in_pieces
                    now, steps_done = time.monotonic(), epoch * steps + done
                    due = not self._quiet and now - last >= wait
                    if epoch < 0:
                        if due or self.shows:
                            last = now
                            show(f"passes to go: {-epoch}, batch {done}")
                        return
                    if start is None and steps_done - first > 1:
                        in_pieces = epoch  # a program a piece, each of which is compiled before its first report
                    if start is None or epoch == in_pieces:
                        start = now, steps_done
                    if self._quiet or steps_done == start[1]:
                        return
                    own = (epochs * steps - steps_done) / steps * images
                    speed = (steps_done - start[1]) / steps * images / max(now - start[0], 1e-9)
                    further = (self._times - 1) * self._whole
                    left = None if self._later is None else (own + self._later + further) / speed
                    measured = steps_done - start[1] >= MEASURED[0] and now - start[0] >= MEASURED[1]
                    if left is not None and left >= LONG_SECONDS and measured and not self._estimated:
                        advice = self._advice if self._advises else ""
                        self._estimated.append(f"about {spoken(left)} to go at {speed:,.0f} images/s{advice}")
                        say(self._estimated[0])
                    if not due:
                        return
                    last = now
                    values = [f"{name} {np.mean(value):.3f}" for name, value in metrics.items()]
                    whole = [f"epoch {epoch + 1}/{epochs}", *values, f"{speed:,.0f} images/s"]
                    if not self.shows:
                        to_go = own / speed if left is None else left
                        in_all = "" if left is None else " in all"
                        part = f"{100 * steps_done // (epochs * steps)}%"
                        whole = [part, *whole, f"about {spoken(to_go)} to go{in_all}"]
                    show("  ".join(whole), steps_done)

                return report

            yield of_epoch


def spoken(seconds: float) -> str:
    """A time as people say it: 7 min, 2 h 10 min, 35 h."""
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    tens = round(minutes / 10) * 10
    hours, rest = divmod(tens, 60)
    return f"{hours} h {rest} min" if rest and hours < 10 else f"{round(minutes / 60)} h"
