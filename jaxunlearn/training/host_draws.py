"""Random numbers that Python or NumPy draw while a step is traced: they become constants of the program."""

import abc
import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from jaxunlearn.files import is_of_others

MAKES_A_GENERATOR = abc.ABCMeta.__instancecheck__.__code__  # with `ISeedSequence`: NumPy looks at the seed


@contextmanager
def watched_draws() -> Iterator[set[str]]:
    """Yields a set; at the end it has the modules, "random" or "numpy.random", with which this thread drew inside.

    Seen is every draw of Python's, every generator of NumPy's that is made inside, and a draw of each that was there
    before. What installed packages draw or make for themselves, as for names of files, does not count. Under a profiler
    only the last of the three is seen.
    """
    found: set[str] = set()

    def see(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            drawer = frame if isinstance(getattr(called, "__self__", None), random.Random) else None
        else:
            made = event == "call" and frame.f_code is MAKES_A_GENERATOR and frame.f_locals.get("cls") is ISeedSequence
            drawer = frame.f_back if made else None
        if drawer and not _of_others(drawer):
            found.add("random" if event == "c_call" else "numpy.random")

    # NumPy's methods are none that a profiler sees.
    generators = [x for x in gc.get_objects() if issubclass(type(x), np.random.BitGenerator)]
    states, profiled = [repr(x.state) for x in generators], sys.getprofile() is not None
    if not profiled:  # one that is no Python function could not be put back
        sys.setprofile(see)
    try:
        yield found
    finally:
        if not profiled:
            sys.setprofile(None)
        if states != [repr(x.state) for x in generators]:
            found.add("numpy.random")


def _of_others(frame: FrameType | None) -> bool:
    """Whether who drew is no code of the user's: of an installed package, or made by one, as beartype's checks are."""
    while frame and frame.f_code.co_filename == random.__file__:
        frame = frame.f_back
    return is_of_others(frame.f_code.co_filename if frame else "")
