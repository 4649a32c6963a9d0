"""`scripts/bench.py` with a tiny benchmark in place: a process that tests may kill."""

import dataclasses
import importlib.util
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from tiny import PROTOCOL, TINY, Tiny

from jaxunlearn.benchmarks import BENCHMARKS, CHOICES
from jaxunlearn.models import MODELS

NAME, NAME_X64 = "tiny-digits-class0", "tiny-x64-class0"
DIGITS = dataclasses.replace(
    PROTOCOL, batch_size=16, train_limit=320, pretrain_epochs=8, unlearn_epochs=4, epoch_length="retain"
)


def load_digits():
    """What scikit-learn's function returns, without importing scikit-learn: that takes a tenth of such a process."""
    package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    table = np.loadtxt(Path(package) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return SimpleNamespace(images=table[:, :-1].reshape(-1, 8, 8), target=table[:, -1].astype(int))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    sys.modules["sklearn.datasets"] = SimpleNamespace(load_digits=load_digits)
    jax.config.update("jax_disable_most_optimizations", True)
    MODELS[TINY] = Tiny
    BENCHMARKS.update({NAME: DIGITS, NAME_X64: dataclasses.replace(DIGITS, precision="fp64")})
    CHOICES["precision"] = ("fp32", "fp64")
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "bench.py"), run_name="__main__")
