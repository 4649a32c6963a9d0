import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import counted_reads, mesh_of

from jaxunlearn.devices.sharding import place_seeds, place_shared
from jaxunlearn.errors import UserError
from jaxunlearn.training import loop
from jaxunlearn.training.loop import Chunk, EpochLoop, Timing, batch_sizes, chunks

NUMBERS = np.random.default_rng(0).normal(size=14).astype(np.float32)
FACTORS = np.array([2.0, -3.0], np.float32)
PLAN = [Chunk(0, 3, (4,)), Chunk(3, 1, (2,))]


@pytest.mark.parametrize(
    ("count", "drop_last", "expected"),
    [(12, False, [4, 4, 4]), (14, False, [4, 4, 4, 2]), (14, True, [4, 4, 4]), (3, False, [3])],
)
def test_batch_sizes(count, drop_last, expected):
    assert batch_sizes(count, 4, drop_last, "training") == expected


@pytest.mark.parametrize(
    ("count", "message"), [(0, "there are no retain images"), (3, "no batch of 4 of the 3 retain images: .* smaller")]
)
def test_images_that_make_no_batch_are_refused_in_one_line(count, message):
    with pytest.raises(UserError, match=message) as caught:
        batch_sizes(count, 4, True, "retain")
    assert "\n" not in str(caught.value)


def test_chunks_are_runs_of_equal_sizes():
    plan = chunks([(4, 4), (4, 4), (4, 1), (4, 4), (2, 4)])
    assert plan == [Chunk(0, 2, (4, 4)), Chunk(2, 1, (4, 1)), Chunk(3, 1, (4, 4)), Chunk(4, 1, (2, 4))]
    assert chunks([]) == []


def test_timing_counts_nested_time_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.5, 10.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timing = Timing()
    with timing("outer"):
        with timing("inner"):
            pass
        with pytest.raises(RuntimeError), timing("inner"):  # what failed took its time too
            raise RuntimeError
    with timing("outer"):
        pass
    assert timing == {"inner": 2.0 + 1.0, "outer": 10.0 - 3.0 + 1.0}


def step(carry, factor, numbers, epoch, index, sizes):
    """Depends on everything a step is given, and on the order of the steps."""
    (size,) = sizes
    batch = jax.lax.dynamic_slice(numbers, (index * 4,), sizes)
    carry = 0.5 * carry + factor * batch.sum() / size + epoch
    return carry, {"index": index.astype(jnp.float32), "value": carry * 2}


def inputs(mesh):
    return (*place_seeds((np.ones(2, np.float32), FACTORS), mesh), place_shared(NUMBERS, mesh))


def by_hand(epoch):
    carry, values = np.ones(2), []
    for start in range(0, 14, 4):
        carry = 0.5 * carry + FACTORS * NUMBERS[start : start + 4].mean() + epoch
        values.append(carry * 2)
    return carry, np.stack(values, axis=1)


def run_loop(report=lambda done, metrics: None, epochs=(3,)):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        toy = EpochLoop(step, mesh, Timing())
        for epoch in epochs:
            result = toy.run(*inputs(mesh), epoch, PLAN, report)
    return result


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("epochs", [(3,), (0, 3)], ids=["first", "after another"])
def test_an_epoch_runs_every_step_in_order_scanned_or_dispatched(monkeypatch, scanned, epochs):
    monkeypatch.setattr(loop, "scans", lambda: scanned)
    carry, metrics = run_loop(epochs=epochs)
    expected_carry, expected_values = by_hand(epochs[-1])
    np.testing.assert_allclose(carry, expected_carry, rtol=1e-6)
    np.testing.assert_allclose(metrics["value"], expected_values, rtol=1e-6)
    np.testing.assert_array_equal(metrics["index"], [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize(("scanned", "steps"), [(False, [1, 2, 3, 4]), (True, [3, 4])])
def test_report_gets_finished_steps_up_to_the_last(monkeypatch, scanned, steps):
    monkeypatch.setattr(loop, "scans", lambda: scanned)
    seen = []
    _, metrics = run_loop(lambda done, metrics: seen.append((done, np.asarray(metrics["value"])[:, -1])))
    assert [done for done, _ in seen] == steps
    for done, value in seen:
        np.testing.assert_array_equal(value, metrics["value"][:, done - 1])


@pytest.mark.parametrize("scanned", [False, True])
def test_an_epoch_fetches_once(monkeypatch, scanned):
    monkeypatch.setattr(loop, "scans", lambda: scanned)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        toy = EpochLoop(step, mesh, Timing())
        toy.run(*inputs(mesh), 0, PLAN)
        again = inputs(mesh)
        with counted_reads() as counts:
            toy.run(*again, 1, PLAN)
    assert counts == {"device_get": 1, "other": 0}


def test_the_counter_of_reads_sees_them_all():
    scalar, vector = jnp.zeros(()), jnp.zeros(3)
    for read in (float, int, bool, lambda x: np.asarray(x), lambda x: x.item()):
        with counted_reads() as counts:
            read(scalar)
        assert counts == {"device_get": 0, "other": 1}, read
    with counted_reads() as counts:
        jax.device_get([scalar, vector])
        np.asarray([1.0])
    assert counts == {"device_get": 1, "other": 0}


def test_the_carry_is_donated_and_the_rest_is_not():
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        carry, seeded, shared = inputs(mesh)
        EpochLoop(step, mesh, Timing()).run(carry, seeded, shared, 0, PLAN)
    assert carry.is_deleted()
    assert not seeded.is_deleted() and not shared.is_deleted()


class Keeper:
    """Keeps what it is given after every dispatch."""

    def __init__(self):
        self.kept = {}

    def due(self):
        return True

    def keep(self, done, carry, metrics):
        self.kept[done] = (np.array(carry), metrics)


@pytest.mark.parametrize("scanned", [False, True])
def test_an_epoch_goes_on_from_any_step(monkeypatch, scanned):
    monkeypatch.setattr(loop, "scans", lambda: scanned)
    mesh, keeper = mesh_of(), Keeper()
    with jax.set_mesh(mesh):
        whole, metrics = EpochLoop(step, mesh, Timing()).run(*inputs(mesh), 3, PLAN, keeper=keeper)
        assert list(keeper.kept) == ([3] if scanned else [1, 2, 3])  # the end is the caller's
        monkeypatch.setattr(loop, "scans", lambda: False)
        each = Keeper()
        EpochLoop(step, mesh, Timing()).run(*inputs(mesh), 3, PLAN, keeper=each)
        monkeypatch.setattr(loop, "scans", lambda: scanned)
        for done in (1, 2, 3):  # also within what is scanned at once
            carry, seeded, shared = inputs(mesh)
            carry = place_seeds(each.kept[done][0], mesh)
            again, rest = EpochLoop(step, mesh, Timing()).run(carry, seeded, shared, 3, PLAN, first=done)
            np.testing.assert_allclose(again, whole, rtol=1e-6)
            np.testing.assert_allclose(rest["value"], metrics["value"][:, done:], rtol=1e-6)
