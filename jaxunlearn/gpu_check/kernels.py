"""What a device did while a program ran, from JAX's profiler: which kernels, how many, for how long."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

LONGEST = 12  # kinds of kernel that are named


def profiled(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """`summed` up for one `run` of so many steps; empty where the profiler sees no device, as on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        data = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    events = [
        (event.name, event.start_ns, event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return summed(events, steps) if events else {}


def summed(events: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Of kernels (name, start, duration; both in nanoseconds), overlapping or not, in any order:

    "kernels": how many a step; "busy": the share of the time from the first's start to the last's end in which at least
    one ran; "longest": milliseconds a step of those that take most, by name without the number at its end.
    """
    count, busy, end, spent = 0, 0.0, 0.0, collections.defaultdict[str, float](float)
    start = None
    for name, begin, duration in sorted(events, key=lambda event: event[1]):
        start = begin if start is None else start
        count += 1
        spent[re.sub(r"[._]?\d+$", "", name)] += duration
        busy += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    assert start is not None, "no kernel"
    order = sorted(spent.items(), key=lambda item: -item[1])
    longest = {name[:80]: round(1e-6 * total / steps, 4) for name, total in order[:LONGEST]}
    return {"kernels": round(count / steps, 1), "busy": round(busy / (end - start), 3), "longest": longest}
