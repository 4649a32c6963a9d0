"""Programs that are compiled ahead: they are those that run, nobody waits twice, and what fails there is said later."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from test_runs import STEPPED, numbers, request_of, tiny_bench
from tiny import CLASSES, PROTOCOL, assert_close, make_images, make_models, make_split, make_unlearning, mesh_of

from jaxunlearn.evaluation.predictions import Evaluator
from jaxunlearn.models.network import make_network
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import abstract_key, seed_keys
from jaxunlearn.registry import get_method
from jaxunlearn.runs import compiling, running
from jaxunlearn.runs.compiling import compiled_ahead
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.training import loop
from jaxunlearn.training.loop import Timing
from jaxunlearn.training.unlearning import Unlearning

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
__all__ = ["tiny_bench"]  # a fixture
BATCHES = dataclasses.replace(PROTOCOL, batch_size=32, epoch_length="retain")  # two steps, the last of six images


@pytest.mark.parametrize(("split", "scanned"), [((1, 1), False), ((1, 1), True), ((2, 2), False)])
def test_what_is_compiled_ahead_is_what_runs(monkeypatch, split, scanned):
    monkeypatch.setattr(loop, "scans", lambda: scanned)
    mesh, keys, states = mesh_of(*split), seed_keys((1, 2)), []
    with jax.set_mesh(mesh):
        for ahead in (True, False):
            run = make_unlearning(get_method("retain_finetune"), BATCHES, mesh)
            if ahead:
                run.compile(2)
            state = run.start(*make_models(BATCHES, (1, 2), mesh), keys)
            before = run.timing["compile_s"]
            states.append(jax.device_get(run.epoch(state, keys, 0)[0]))
            assert (run.timing["compile_s"] == before) == ahead
    assert_close(*states, rtol=0)


@pytest.mark.parametrize("split", [(1, 1), (2, 2)])
def test_the_evaluation_too(split):
    mesh, timing = mesh_of(*split), Timing()
    network, sets = make_network(PROTOCOL, CLASSES), (make_images(), make_split(), make_images(23, seed=1))
    with jax.set_mesh(mesh):
        evaluator = Evaluator(network, PROTOCOL, *sets, mesh, timing)
        evaluator.compile(jax.eval_shape(network.initialise, abstract_key()), 2)
        evaluator.predict(*make_models(PROTOCOL, (1, 2), mesh), seed_keys((1, 2)))
    assert "compile_s" not in timing


def test_a_run_waits_for_what_is_being_compiled_and_the_clock_of_compilation_runs(tmp_path, monkeypatch):
    started, may_end, compile_ = threading.Event(), threading.Event(), Unlearning.compile

    def slow(unlearning, count):
        started.set()
        assert may_end.wait(60)
        compile_(unlearning, count)

    monkeypatch.setattr(Unlearning, "compile", slow)
    monkeypatch.setattr(compiling, "wait", lambda futures: (may_end.set(), futures[0].result()))
    run = prepare(request_of(tmp_path, protocol=STEPPED), Reporter(quiet=True))
    with jax.set_mesh(run.mesh), compiled_ahead(run) as ahead:
        assert started.wait(60)
        ahead.ready("retain_finetune")
    assert may_end.is_set() and run.timing["compile_s"] > 0


def test_what_fails_ahead_is_said_where_it_is_called_and_records_are_the_same(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("not now")

    found = []
    for name in ("ahead", "fails"):
        request = request_of(tmp_path / name, protocol=STEPPED, seeds=(1, 2))
        found.append([record for record, _ in running.results(prepare(request, Reporter(quiet=True)))])
        monkeypatch.setattr(Unlearning, "compile", fails)
        monkeypatch.setattr(Evaluator, "compile", fails)
    assert list(map(numbers, found[0])) == list(map(numbers, found[1]))


@pytest.mark.parametrize(("platform", "programs"), [("gpu", 0), ("cpu", 2)])
def test_on_a_gpu_nothing_compiles_beside_what_runs(tmp_path, monkeypatch, platform, programs):
    submitted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            submitted.append(arguments)
            return super().submit(lambda: None)

    run = prepare(request_of(tmp_path, protocol=STEPPED), Reporter(quiet=True))
    monkeypatch.setattr(compiling, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with jax.set_mesh(run.mesh), compiled_ahead(run) as ahead:
        for name in (compiling.EVALUATE, "retain_finetune"):
            ahead.ready(name)
    assert len(submitted) == programs
