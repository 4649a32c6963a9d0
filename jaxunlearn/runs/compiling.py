"""Compilation ahead: while a model is pretrained, what is run afterwards is compiled in threads.

Not on a GPU, where XLA measures its kernels as it compiles: that deadlocks beside another compilation or a running
program (openxla/xla#41399, #42347). On an H200 such a run stood still from its second minute on. There every program is
compiled when it is first called.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial

import jax

from jaxunlearn.devices.configuration import computing
from jaxunlearn.randomness import abstract_key
from jaxunlearn.runs.groups import first_of_each
from jaxunlearn.runs.preparation import Prepared

EVALUATE, RELEARN = ".evaluate", ".relearn"  # no method has such a name


class Ahead:
    """Programs by what they are for: the title of a group, `EVALUATE` or `RELEARN`."""

    def __init__(self, run: Prepared, futures: dict[str, Future[None]]):
        self._run, self._futures = run, futures

    def ready(self, name: str) -> None:
        """Returns once the programs are compiled, or are not going to be: then their first call compiles them.

        To be called before `name` is used: a rule may keep what it is traced with, so no two threads may trace it.
        """
        future = self._futures.pop(name, None)
        if future and not future.cancel():
            with self._run.timing("compile_s"):
                wait([future])


@contextmanager
def compiled_ahead(run: Prepared) -> Iterator[Ahead]:
    """Compiles a run's programs in threads; what has not begun at the end is left out."""
    x64 = jax.dtypes.canonicalize_dtype(float).itemsize == 8

    def work(mesh: jax.sharding.Mesh, task: Callable[[], None]) -> None:
        # JAX's settings are a thread's own. What is wrong with a program is said where it is called.
        precise = computing(run.request.protocol.precision)
        with suppress(Exception), jax.enable_x64(x64), jax.set_mesh(mesh), precise:
            task()

    tasks = {} if jax.default_backend() == "gpu" else _tasks(run)
    pool = ThreadPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1)), "compile")
    futures = {name: pool.submit(work, *task) for name, task in tasks.items()}
    del tasks  # or what is done with would be kept
    try:
        yield Ahead(run, futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(run: Prepared) -> dict[str, tuple[jax.sharding.Mesh, Callable[[], None]]]:
    """What compiles, and for which mesh."""
    count = len(run.keys)
    variables = jax.eval_shape(run.network.initialise, abstract_key())
    tasks: dict[str, tuple[jax.sharding.Mesh, Callable[[], None]]] = {
        EVALUATE: (run.mesh, partial(run.evaluator.compile, variables, count))
    }
    for group in first_of_each(run.groups):
        if unlearning := run.unlearnings.get(group.title):
            tasks[group.title] = unlearning.mesh, partial(unlearning.compile, run.count(group))
    if run.relearning is not None:
        tasks[RELEARN] = run.mesh, partial(run.relearning.compile, count)
    return tasks
