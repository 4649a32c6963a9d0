"""Passes over a whole set before the first step: what they see, what they leave, and where they go on after a stop."""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    CLASSES,
    COUNT,
    PLAIN,
    PROTOCOL,
    assert_close,
    assert_differ,
    make_images,
    make_models,
    make_split,
    make_unlearning,
    mesh_of,
)

from jaxunlearn.data.batches import normalise
from jaxunlearn.methods.rule import Pass, UnlearningRule, cross_entropy, init_state
from jaxunlearn.models.network import make_network
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import Method, get_method
from jaxunlearn.training import loop, resuming
from jaxunlearn.training.checkpoints import unlearn_entry
from jaxunlearn.training.history import Position
from jaxunlearn.training.resuming import Start, train
from jaxunlearn.training.saving import Saving

pytestmark = pytest.mark.usefixtures("tiny_models")
SEEDS = (1, 2)
SMALL = dataclasses.replace(PROTOCOL, model=PLAIN, batch_size=8)
BATCHES = {"forget": [8, 8, 3], "all": [8] * 7 + [1]}


def watching(over, **options):
    """A pass that writes down what it is given: (batch, place in it) by image, sums of images, and keys."""

    def init(params, state):
        return {"seen": jnp.full((COUNT, 3), -1), "sums": jnp.zeros(COUNT), "keys": jnp.zeros(9, jnp.uint32)}

    def step(params, state, carry, batch):
        what = jnp.stack([jnp.full_like(batch.labels, state.step), jnp.arange(len(batch.labels)), batch.labels], 1)
        key = jax.random.key_data(state.key)[0]
        return {
            "seen": carry["seen"].at[batch.indices].set(what),
            "sums": carry["sums"].at[batch.indices].add(batch.images.sum((1, 2, 3))),
            "keys": carry["keys"].at[state.step].set(key),
        }

    def finish(params, state, carry):
        extra = {**state.extra, over: carry, f"{over} batches": state.step}
        return jax.tree.map(lambda p: p + 1, params), state._replace(extra=extra)

    return Pass(over, init, step, finish, **options)


def rule_of(*passes, step=None):
    """Passes, each of which leaves in `extra` what it has written down."""

    def factory(context):
        carry = passes[0].init(None, None)
        extra = {one.over: carry for one in passes} | {f"{one.over} batches": jnp.int32(0) for one in passes}
        return UnlearningRule(partial(init_state, context, extra=extra), step, passes=passes)

    return Method("mine", factory, {}, {})


def passed(method, mesh=None, seeds=SEEDS):
    """The state of these seeds after all passes, on the host."""
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        run = make_unlearning(method, SMALL, mesh)
        run.compile(len(seeds))
        return after_epochs(run, seeds)


def after_epochs(run, seeds):
    """The state after the last epoch, of which passes are the first, on the host."""
    keys = seed_keys(seeds)
    carry = run.start(*make_models(SMALL, seeds, run.mesh), keys)
    for number in range(-run.passes, run.epochs):
        carry, metrics = run.epoch(carry, keys, number)
        assert (metrics == {}) == (number < 0)
    return jax.device_get(carry)


@pytest.fixture(scope="module")
def watched(tiny_models):
    return passed(rule_of(*map(watching, BATCHES)))


def test_a_pass_sees_every_clean_image_of_its_set_once_in_file_order(watched):
    sets = make_split()._asdict() | {"all": np.arange(COUNT)}
    sums = np.asarray(normalise(jnp.asarray(make_images().images), SMALL)).sum((1, 2, 3))
    for over, sizes in BATCHES.items():
        places = [(batch, place) for batch, size in enumerate(sizes) for place in range(size)]
        for seed in range(2):
            seen = watched.extra[over]["seen"][seed]
            np.testing.assert_array_equal(seen[sets[over], :2], places)
            np.testing.assert_array_equal(seen[sets[over], 2], make_images().labels[sets[over]])
            assert (np.delete(seen, sets[over], 0) == -1).all()
            expected = np.where(np.isin(np.arange(COUNT), sets[over]), sums, 0)
            np.testing.assert_allclose(watched.extra[over]["sums"][seed], expected, rtol=1e-3, atol=0.1)
        np.testing.assert_array_equal(watched.extra[f"{over} batches"], [len(sizes)] * 2)
    drawn = np.concatenate([watched.extra[over]["keys"][:, : len(sizes)].ravel() for over, sizes in BATCHES.items()])
    assert len(np.unique(drawn)) == len(drawn) == 2 * sum(map(len, BATCHES.values()))


def test_passes_follow_each_other_and_change_the_model(watched):
    params, _ = make_models(SMALL, SEEDS, mesh_of())
    assert_close(watched.params, jax.tree.map(lambda p: np.asarray(p) + 2, params), 1e-6)
    assert watched.passing == ()


def test_several_devices_and_a_scan_agree(watched, monkeypatch):
    monkeypatch.setattr(loop, "scans", lambda: True)
    assert_close(passed(rule_of(*map(watching, BATCHES)), mesh_of(2, 2)), watched, 1e-5)


def test_a_part_of_the_images_is_drawn_for_each_seed_and_may_be_seen_one_by_one():
    after = passed(rule_of(watching("retain", images=5, batch_size=1), watching("forget", images=100)))
    chosen = [np.flatnonzero(seen[:, 0] >= 0) for seen in after.extra["retain"]["seen"]]
    for own, seen in zip(chosen, after.extra["retain"]["seen"], strict=True):
        assert set(own) < set(make_split().retain)
        np.testing.assert_array_equal(np.sort(seen[own, 0]), range(5))
        assert (seen[own, 1] == 0).all()
    assert set(chosen[0]) != set(chosen[1])
    np.testing.assert_array_equal(after.extra["forget batches"], [3, 3])  # there are no more than 19
    alone = passed(rule_of(watching("retain", images=5, batch_size=1)), seeds=SEEDS[1:])
    np.testing.assert_array_equal(alone.extra["retain"]["seen"][0], after.extra["retain"]["seen"][1])


def test_a_rule_of_two_passes_over_batches_is_its_equation():
    """Selective synaptic dampening: the importance for all images is kept, that for the forgotten ones is used."""
    after = passed(get_method("ssd", {"alpha": "1.05"}), seeds=(1,))
    params, stats = jax.tree.map(lambda x: x[0], make_models(SMALL, (1,), mesh_of()))
    images, labels = make_images()

    @jax.jit
    def gradient(images, labels):
        network = make_network(SMALL, CLASSES)
        return jax.grad(lambda p: cross_entropy(network.apply_eval(p, stats, images), labels))(params)

    importances = {}
    for kind, places in (("forget", make_split().forget), ("all", np.arange(COUNT))):
        parts = [places[start : start + 8] for start in range(0, len(places), 8)]
        squares = [
            jax.tree.map(
                lambda g: np.float64(g) ** 2, gradient(normalise(jnp.asarray(images[part]), SMALL), labels[part])
            )
            for part in parts
        ]
        importances[kind] = jax.tree.map(lambda *s: np.mean(s, 0), *squares)
    assert_close(jax.tree.map(lambda x: np.float64(x[0]), after.extra), importances["all"], 1e-4)

    def dampen(p, of_forget, of_all):
        return np.where(of_forget > 1.05 * of_all, p * np.minimum(of_all / of_forget, 1), p).astype(np.float32)

    expected = jax.tree.map(dampen, params, importances["forget"], importances["all"])
    assert_close(jax.tree.map(lambda x: x[0], after.params), expected, 1e-3)
    assert_differ(params, expected)


# Stops.


def stopping_after(monkeypatch, batches):
    """Asks the run to stop once so many batches (None: any) are done; returns a list that grows with them."""
    dispatched, due = [], Saving.due

    def counted(saving):
        dispatched.append(saving.position)
        return due(saving)

    @contextlib.contextmanager
    def deferred():
        yield lambda: len(dispatched) == batches

    monkeypatch.setattr(Saving, "due", counted)
    monkeypatch.setattr(resuming, "deferred", deferred)
    return dispatched


def test_a_run_that_stops_within_a_pass_goes_on_from_there_and_ends_the_same(tmp_path, monkeypatch):
    def step(params, state, retain, forget):
        sums = state.extra["retain"]["sums"] + retain.images.mean()
        extra = {**state.extra, "retain": {**state.extra["retain"], "sums": sums}}
        return params, state._replace(extra=extra), {"loss": sums.mean()}

    method = rule_of(watching("retain"), watching("forget"), step=step)
    entries = [unlearn_entry(tmp_path, SMALL, "digest", seed, method) for seed in SEEDS]
    with jax.set_mesh(mesh_of()):
        run, models = make_unlearning(method, SMALL, mesh_of()), make_models(SMALL, SEEDS, mesh_of())

        def trained():
            start = Start(run, partial(run.start, *models))
            seeds = [(seed, 0) for seed in SEEDS]
            return train(lambda group: start, entries, seeds, mesh_of(), Reporter(quiet=True), "mine", 1000.0)

        total = 0
        for batches in (3, 1, 2, 4, None):  # in the first pass, again, in the second, in the first epoch, to the end
            done = stopping_after(monkeypatch, batches)
            with contextlib.nullcontext() if batches is None else pytest.raises(KeyboardInterrupt):
                state, outcomes = trained()
            monkeypatch.undo()
            total += len(done)
            if batches == 3:
                assert entries[0].positions == {Position(-2, 3)}
        assert total == 5 + 3 + 4 * 3  # none twice
        undisturbed = after_epochs(run, SEEDS)
    assert_close(jax.device_get(state), undisturbed, 0)
    assert entries[0].positions == {Position(4, 0)}
    assert all(0 < own.prepared < own.seconds for own in outcomes)
    assert [len(own.curves["loss"]) for own in outcomes] == [4, 4]
