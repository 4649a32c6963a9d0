"""Progress bars on stderr for work that takes long; nothing where stderr is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 1.0  # how often a value is read from the device

# (steps of the epoch that are done, metrics [S, steps] of the last ones, ready)
Report = Callable[[int, dict[str, Any]], None]


class Reporter:
    """Shows one bar at a time. `quiet` shows none."""

    def __init__(self, quiet: bool = False):
        self.shows = not quiet and sys.stderr.isatty()

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
            last = time.monotonic()
            start: tuple[float, int] | None = None  # the first report: what came before was compilation

            def of_epoch(epoch: int) -> Report:
                def report(done: int, metrics: dict[str, Any]) -> None:
                    nonlocal last, start
                    now, steps_done = time.monotonic(), epoch * steps + done
                    if epoch < 0:
                        bar.update(shown, text=f"passes to go: {-epoch}, batch {done}")
                        return
                    start = start or (now, steps_done)
                    if not self.shows or now - last < REFRESH_SECONDS or steps_done == start[1]:
                        return
                    last = now
                    rate = (steps_done - start[1]) / steps * images / (now - start[0])
                    values = "  ".join(f"{name} {np.mean(value):.3f}" for name, value in metrics.items())
                    text = f"epoch {epoch + 1}/{epochs}  {values}  {rate:,.0f} images/s"
                    bar.update(shown, completed=steps_done, text=text)

                return report

            yield of_epoch
