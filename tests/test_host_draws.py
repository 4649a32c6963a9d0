"""Draws of Python's and NumPy's random numbers: which are seen."""

import cProfile
import random
import sys
import tempfile
from random import gauss

import jax
import numpy as np
import pytest
from numpy.random import default_rng, normal

from jaxunlearn.training.host_draws import watched_draws

GENERATOR, LEGACY, PYTHON = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)

DRAWS = {
    "numpy.random": [
        lambda: np.random.normal(),
        lambda: normal(size=3),
        lambda: np.random.rand(2, 3),
        lambda: np.random.shuffle([1, 2, 3]),
        lambda: np.random.seed(0),
        lambda: GENERATOR.integers(3),
        lambda: LEGACY.randn(2),
        lambda: GENERATOR.bit_generator.random_raw(),
        lambda: np.random.default_rng(0).normal(),
        lambda: default_rng(0).permutation(4),
        lambda: np.random.RandomState(0).uniform(),
        lambda: np.random.Generator(np.random.PCG64(1)).random(),
    ],
    "random": [
        lambda: random.random(),
        lambda: gauss(0, 1),
        lambda: random.choice([1, 2]),
        lambda: random.shuffle([1, 2, 3]),
        lambda: PYTHON.uniform(1, 2),
        lambda: random.Random(0).randint(1, 6),
    ],
}


@pytest.mark.parametrize(("module", "draw"), [(module, draw) for module, draws in DRAWS.items() for draw in draws])
def test_a_draw_is_seen(module, draw):
    with watched_draws() as found:
        draw()
    assert found == {module}


def test_what_draws_none_or_for_itself_is_let_alone(tmp_path):
    with watched_draws() as found:
        np.asarray(range(3)).mean()
        jax.make_jaxpr(lambda key: jax.random.normal(key, (3,)))(jax.random.key(0))
        tempfile.mktemp(dir=tmp_path)
        isinstance(3, np.random.bit_generator.SeedSequence)
        exec(compile("random.random(), np.random.PCG64(3)", "/env/site-packages/other/jitter.py", "eval"), globals())
        exec(compile("random.getrandbits(8)", "<@beartype(step) at 0x7f>", "eval"), globals())
    assert found == set()


def test_a_profiler_of_the_users_is_let_alone():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with watched_draws() as found:
            GENERATOR.normal()
        len("")  # would fail if the profiler were not as it was
    finally:
        profiler.disable()
    assert found == {"numpy.random"} and sys.getprofile() is None
