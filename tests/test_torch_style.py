"""Classes of the PyTorch harness: the baselines written so equal the package's rules, and what every part promises."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    CLASSES,
    PLAIN,
    PROTOCOL,
    assert_close,
    host_models,
    make_batch,
    make_models,
    make_unlearning,
    mesh_of,
    run_epochs,
    to_rounding,
    unlearn,
)

from jaxunlearn.methods.rule import RuleState, cross_entropy
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import BASELINES, Method, get_method
from jaxunlearn.torch_style import Model, UnlearningMethod, as_rule, baselines
from jaxunlearn.torch_style.models import Generator
from jaxunlearn.training.unlearning import make_context

pytestmark = pytest.mark.usefixtures("tiny_models")
FOLDER = Path(baselines.__file__).parent
SEEDS = (1, 2)
RETAIN, FORGET = make_batch(9, seed=0), make_batch(5, seed=1, labels=0)
PLAIN_PROTOCOL = dataclasses.replace(PROTOCOL, model=PLAIN)  # without dropout


@functools.cache
def context():
    return make_context(make_network(PLAIN_PROTOCOL, CLASSES), PLAIN_PROTOCOL, CLASSES, 1)


def start(factory, index=0, **hyperparameters):
    """A rule on model `index`: (rule, params, state before the first step)."""
    rule = factory(context(), **hyperparameters)
    params, batch_stats = jax.tree.map(jnp.asarray, host_models(PLAIN_PROTOCOL, index))
    return rule, params, rule.init(params, batch_stats, jax.random.key(3))


def make_model(seed=0, model=PLAIN):
    network = make_network(dataclasses.replace(PROTOCOL, model=model), CLASSES)
    return Model(network, *network.initialise(jax.random.key(seed)), Generator(jax.random.key(seed)))


# The baselines.


@pytest.mark.parametrize("name", BASELINES)
@to_rounding
def test_a_class_is_the_rule_of_its_name(name, protocol, epochs, rtol):
    if name == "scrub":  # its two updates draw their dropout in another way
        protocol = dataclasses.replace(protocol, model=PLAIN)
    expected, expected_metrics = unlearn(name, protocol, SEEDS, epochs, mesh_of())
    method = get_method(str(FOLDER / f"torch_{name}.py"))
    mesh = mesh_of(2, 2) if protocol.precision == "fp64" else mesh_of()
    with jax.enable_x64(protocol.precision == "fp64"), jax.set_mesh(mesh):
        unlearning, keys = make_unlearning(method, protocol, mesh), seed_keys(SEEDS)
        carry = unlearning.start(*make_models(protocol, SEEDS, mesh), keys)
        carry, metrics = run_epochs(unlearning, carry, keys, epochs)
    assert_close(tuple(carry[:3]), tuple(expected[:3]), rtol)
    assert_close(metrics, expected_metrics, rtol)


@pytest.mark.parametrize("name", BASELINES)
def test_a_class_has_the_hyperparameters_and_teachers_of_the_rule(name):
    mine, theirs = get_method(str(FOLDER / f"torch_{name}.py")), get_method(name)
    assert mine.defaults == theirs.defaults
    for settings in ({}, {"reset_bn": True}) if name == "bad_teacher" else ({},):
        _, _, (*_, extra, _, _) = start(mine.factory, **settings)
        _, _, (*_, expected, _, _) = start(theirs.factory, **settings)
        if name in ("bad_teacher", "scrub"):
            assert_close(jax.tree.leaves(extra), jax.tree.leaves(expected), 0)
        else:
            assert jax.tree.leaves(extra) == []


# What a step is given, and what it may do.


def programs_of(factory):
    """How many programs the step for two seeds chooses from."""
    rule, params, state = start(factory)
    twice = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
    axes = RuleState(0, 0, 0, 0, None, None)
    mapped = jax.vmap(rule.step, (0, axes, 0, 0), (0, axes, 0))
    together = twice(state)._replace(step=state.step, epoch=state.epoch)
    return count_programs(jax.make_jaxpr(mapped)(twice(params), together, twice(RETAIN), twice(FORGET)))


def count_programs(jaxpr):
    switches = [equation for equation in jaxpr.eqns if equation.primitive.name == "cond"]
    assert len(switches) <= 1
    return len(switches[0].params["branches"]) if switches else 1


@pytest.mark.parametrize(("name", "programs"), [(name, 2 if name == "scrub" else 1) for name in BASELINES])
def test_a_class_is_as_many_programs_as_differ(name, programs):
    assert programs_of(get_method(str(FOLDER / f"torch_{name}.py")).factory) == programs


class Watching:
    """Inherits from nothing, learns nothing, and returns what it is given."""

    def __init__(self, base=0.5):
        self.base = base
        self.weak = jnp.asarray(0.5)  # of a weak dtype, but not after a step

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        assert type(epoch) is int and isinstance(step, jax.core.Tracer) and model.training
        self.weak += forget_batch.images.mean()
        (_, retain_labels), (forget_images, _) = retain_batch, forget_batch
        return {
            "loss": self.base**epoch,
            "epoch": epoch,
            "step": step,
            "sizes": len(retain_labels) + len(forget_images),
        }


def test_the_epoch_is_an_int_the_step_is_traced_and_batches_are_pairs():
    protocol = dataclasses.replace(PROTOCOL, batch_size=8)
    with jax.set_mesh(mesh_of()):
        unlearning, keys = (
            make_unlearning(Method("mine", as_rule(Watching), {}, {}), protocol, mesh_of()),
            seed_keys(SEEDS),
        )
        carry = unlearning.start(*make_models(protocol, SEEDS, mesh_of()), keys)
        _, metrics = run_epochs(unlearning, carry, keys, 3)
    np.testing.assert_array_equal(metrics["epoch"], [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2)
    np.testing.assert_array_equal(metrics["loss"], 0.5 ** metrics["epoch"])
    np.testing.assert_array_equal(metrics["step"], [range(9)] * 2)
    np.testing.assert_array_equal(metrics["sizes"], [[16, 16, 11] * 3] * 2)
    assert programs_of(as_rule(Watching)) == 1


class Keeping(UnlearningMethod):
    """Carries arrays and a teacher that is in train mode, and replaces them inside and outside of the closure."""

    def __init__(self):
        self.name = "keeping"
        self.steps = jnp.zeros((), jnp.int32)

    def setup(self, model):
        self.kept = {"average": jnp.zeros(CLASSES), "models": [copy.deepcopy(model)]}
        self.key = model.random_key()

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        self.name = "keeping"
        self.steps += 1
        self.key, _ = jax.random.split(self.key)

        def closure():
            logits = model(retain_batch.images)
            self.kept["average"] = 0.5 * self.kept["average"] + logits.mean(0)
            self.kept["models"][0](forget_batch.images)
            return cross_entropy(logits, retain_batch.labels)

        return {"loss": optimizer.step(closure), "steps": self.steps}


def test_arrays_on_self_are_carried_from_step_to_step():
    rule, before, state = start(as_rule(Keeping))
    step, stats, key = jax.jit(rule.step), state.batch_stats, jax.random.key(0)
    params, first, _ = step(before, state, RETAIN, FORGET)
    _, second, metrics = step(params, first, RETAIN, FORGET)
    assert metrics["steps"] == 2 == second.extra["steps"][0]
    network = make_network(PLAIN_PROTOCOL, CLASSES)
    means = [network.apply_train(p, stats, RETAIN.images, key)[0].mean(0) for p in (before, params)]
    average, *teacher = second.extra["kept"]
    np.testing.assert_allclose(average, 0.5 * means[0] + means[1], rtol=1e-4)
    for _ in range(2):
        stats = network.apply_train(before, stats, FORGET.images, key)[1]
    assert_close(teacher, jax.tree.leaves((before, stats)), 1e-5)
    assert (jax.random.key_data(first.extra["key"][0]) != jax.random.key_data(second.extra["key"][0])).any()


class Named(UnlearningMethod):
    """Changes what is on self by other names for it, after a step."""

    def setup(self, model):
        self.kept = {"models": [copy.deepcopy(model).eval()], "steps": (jnp.zeros(()), {"n": jnp.zeros(())})}

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        (last,), (_, counts) = self.kept["models"], self.kept["steps"]
        loss = optimizer.step(lambda: cross_entropy(model(retain_batch.images), retain_batch.labels))
        last.load_state_dict(model.state_dict())
        counts["n"] += 1
        return {"loss": loss}


def test_another_name_for_what_is_on_self_stays_one_after_a_step():
    rule, params, state = start(as_rule(Named))
    for _ in range(2):
        params, state, _ = jax.jit(rule.step)(params, state, RETAIN, FORGET)
    *last, _, counted = state.extra["kept"]
    assert_close(last, jax.tree.leaves((params, state.batch_stats)), 0)
    assert counted == 2


# Gradients as values, the look at the data, and weights that a step writes itself.


class Halves(UnlearningMethod):
    """Cross-entropy on retain by the halves of a step; `clip` is the largest norm of the gradients."""

    def __init__(self, clip: float = 0.0):
        self.clip = clip

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch
        loss, gradients = optimizer.gradients(lambda: cross_entropy(model(images), labels))
        if self.clip:
            gradients, _ = optax.clip_by_global_norm(self.clip).update(gradients, None)
        optimizer.update(gradients)
        return {"loss": loss}


def direct_gradients(params, batch_stats, batch):
    """Of the cross-entropy in train mode, as a tree like the parameters."""

    def loss(params):
        return cross_entropy(
            context().apply_train(params, batch_stats, batch.images, jax.random.key(0))[0], batch.labels
        )

    return jax.jit(jax.grad(loss))(params)


def first_gradients(state):
    """What Adam was given in its first step."""
    return jax.tree.map(lambda mu: mu / (1 - PROTOCOL.adam_b1), optax.tree_utils.tree_get(state.opt_state, "mu"))


def test_the_halves_of_a_step_are_the_step():
    rule, params, state = start(as_rule(Halves))
    whole = get_method(str(FOLDER / "torch_retain_finetune.py")).factory(context())
    mine, theirs = (jax.jit(rule.step)(params, state, RETAIN, FORGET) for rule in (rule, whole))
    assert_close((mine[0], mine[1][:2]), (theirs[0], theirs[1][:2]), 1e-6)
    assert_close(first_gradients(mine[1]), direct_gradients(params, state.batch_stats, RETAIN), 1e-5)
    assert programs_of(as_rule(Halves)) == 1


def test_gradients_are_clipped_by_their_norm():
    rule, params, state = start(as_rule(Halves), clip=0.01)
    _, state, _ = jax.jit(rule.step)(params, state, RETAIN, FORGET)
    whole, clipped = direct_gradients(params, state.batch_stats, RETAIN), first_gradients(state)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(whole)))
    assert norm > 0.01
    assert_close(clipped, jax.tree.map(lambda g: g * 0.01 / norm, whole), 1e-5)


class Averaged(UnlearningMethod):
    """The model that is left is the mean of all that were learned, the first included."""

    def setup(self, model):
        self.fast = model.state_dict()
        self.count = jnp.ones(())

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        mean = model.state_dict()
        model.load_state_dict(self.fast)
        loss = optimizer.step(lambda: cross_entropy(model(retain_batch.images), retain_batch.labels))
        self.fast, self.count = model.state_dict(), self.count + 1
        model.load_state_dict({name: old + (self.fast[name] - old) / self.count for name, old in mean.items()})
        return {"loss": loss}


def test_a_step_may_leave_the_mean_of_weights():
    rule, params, state = start(as_rule(Averaged))
    step, plain = jax.jit(rule.step), jax.jit(get_method("retain_finetune").factory(context()).step)
    expected, fast, adam = [(params, state.batch_stats)], params, state
    for _ in range(2):
        params, state, _ = step(params, state, RETAIN, FORGET)
        fast, adam, _ = plain(fast, adam._replace(extra=()), RETAIN, FORGET)
        expected.append((fast, adam.batch_stats))
    mean = jax.tree.map(lambda *values: sum(values) / len(values), *expected)
    assert_close((params, state.batch_stats), mean, 1e-5)


class Looking(UnlearningMethod):
    """Counts the labels before the first step, changes a weight there, and draws twice."""

    def setup(self, model):
        self.labels = jnp.zeros((2, CLASSES), jnp.int32)
        self.drawn = jax.random.normal(model.random_key(), (2,))

    def prepare(self, model, retain_set, forget_set, optimizer):
        for row, batches in enumerate((retain_set, forget_set)):
            for _, labels in batches:
                self.labels = self.labels.at[row].add(jnp.bincount(labels, length=CLASSES))
        self.drawn = self.drawn.at[1].set(jax.random.normal(model.random_key(), (2,))[0])
        model.load_state_dict({"linear.bias": self.drawn[0] + jnp.arange(CLASSES)})

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        return {"loss": self.drawn.sum()}


def test_a_class_looks_at_the_data_before_the_first_step():
    protocol = dataclasses.replace(PROTOCOL, batch_size=8)
    with jax.set_mesh(mesh_of()):
        unlearning = make_unlearning(Method("mine", as_rule(Looking), {}, {}), protocol, mesh_of())
        carry = jax.device_get(unlearning.start(*make_models(protocol, SEEDS, mesh_of()), seed_keys(SEEDS)))
    np.testing.assert_array_equal(carry.extra["labels"][0], [[[0, 19, 19], [19, 0, 0]]] * 2)
    drawn = carry.extra["drawn"][0]
    assert len(set(drawn.ravel())) == 4  # by each seed, in setup and in prepare
    np.testing.assert_allclose(carry.params["linear"]["bias"], drawn[:, :1] + np.arange(CLASSES))
