"""Classes of the PyTorch harness: the baselines written so equal the package's rules, and what every part promises."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    CLASSES,
    PLAIN,
    PROTOCOL,
    assert_close,
    assert_differ,
    host_models,
    make_batch,
    make_models,
    make_unlearning,
    mesh_of,
    run_epochs,
    to_rounding,
    unlearn,
)

from jaxunlearn import torch_style
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.methods.rule import RuleState, cross_entropy
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import BASELINES, Method, get_method
from jaxunlearn.torch_style import Model, UnlearningMethod, as_rule, baselines
from jaxunlearn.torch_style.models import Generator
from jaxunlearn.training.checking import check_rule
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


# Models.


def test_a_model_in_train_mode_moves_its_statistics_in_the_order_of_the_calls():
    model, network = make_model(), make_network(PLAIN_PROTOCOL, CLASSES)
    stats, key = model.batch_stats, jax.random.key(0)
    for images in (RETAIN.images, FORGET.images, RETAIN.images):
        logits, stats = network.apply_train(model.params, stats, images, key)
        assert_close(model(images), logits, 0)
        assert_close(model.batch_stats, stats, 0)


def test_a_model_in_eval_mode_uses_its_statistics_and_keeps_them():
    model, network = make_model(), make_network(PLAIN_PROTOCOL, CLASSES)
    model(RETAIN.images)
    stats = model.batch_stats
    assert model.eval() is model
    assert_close(model(FORGET.images), network.apply_eval(model.params, stats, FORGET.images), 0)
    assert model.batch_stats is stats
    assert_differ(model.train()(FORGET.images), model.eval()(FORGET.images))
    assert model.train().training and not model.train(False).training


def test_dropout_is_new_with_every_call_and_for_every_copy():
    model = make_model(model=PROTOCOL.model)
    teacher = copy.deepcopy(model)
    outputs = [forward(RETAIN.images) for forward in (model, model, teacher)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert_differ(outputs[one], outputs[other])
    assert_close(model.eval()(RETAIN.images), model(RETAIN.images), 0)


def test_a_copy_stays_as_it_is_and_has_no_gradient():
    model = make_model()
    teacher = copy.deepcopy(model).eval()
    params, expected = model.params, teacher(RETAIN.images)
    model(RETAIN.images)
    model.params = jax.tree.map(lambda p: 2 * p, params)
    assert model.training and not teacher.training
    assert_close(teacher(RETAIN.images), expected, 0)

    def loss(params):
        model.params = params
        return copy.deepcopy(model)(RETAIN.images).sum()

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_a_reset_model_has_new_parameters_and_old_statistics():
    model = make_model()
    model(RETAIN.images)
    before, stats = model.params, model.batch_stats
    model.reset_parameters()
    once = model.params
    model.reset_parameters()
    for pair in ((before, once), (once, model.params)):
        assert_differ(*pair)
    assert model.batch_stats is stats
    model.reset_running_stats()
    assert_close(model.batch_stats, make_network(PLAIN_PROTOCOL, CLASSES).initialise(jax.random.key(0))[1], 0)


def test_images_in_pytorchs_layout_are_refused():
    with pytest.raises(UserError, match=r"images \[B, 32, 32, 3\], not \[9, 3, 32, 32\]: .*transpose"):
        make_model()(RETAIN.images.transpose(0, 3, 1, 2))


CONSTRUCTORS = {
    "resnet20": "resnet20-cifar10-class0",
    "vgg16_bn": "vgg16bn-cifar100-class0",
    "mobilenet_v2": "mobilenetv2-fmnist-class0",
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_makes_the_network_of_its_benchmark(name):
    network = make_network(get_benchmark(CONSTRUCTORS[name]), CLASSES)
    made = getattr(torch_style, name)(num_classes=CLASSES, seed=1)
    params, batch_stats = jax.jit(network.initialise)(jax.random.key(1))
    assert_close((made.params, made.batch_stats), (params, batch_stats), 0)
    assert made.training
    assert [p.shape for p in made.parameters()] == [p.shape for p in jax.tree.leaves(params)]
    functions = made.network.apply_eval, jax.jit(network.apply_eval)
    mine, theirs = (function.lower(params, batch_stats, RETAIN.images).as_text() for function in functions)
    assert mine == theirs


def test_a_constructors_model_computes_what_the_network_does_also_from_a_file(tmp_path):
    network = make_network(get_benchmark("resnet20-cifar10-class0"), 10)
    made = torch_style.resnet20(seed=1)
    variables = {"params": made.params, "batch_stats": made.batch_stats}
    np.savez(tmp_path / "weights.npz", **to_state_dict(variables))
    model = torch_style.resnet20(weights=tmp_path / "weights.npz")
    logits, stats = jax.jit(network.apply_train)(*variables.values(), RETAIN.images, jax.random.key(0))
    assert_close(model(RETAIN.images), logits, 1e-5)
    assert_close(model.batch_stats, stats, 1e-5)
    expected = jax.jit(network.apply_eval)(made.params, stats, FORGET.images)
    assert_close(model.eval()(FORGET.images), expected, 1e-5)
    with pytest.raises(UserError, match="do not fit the model"):
        torch_style.resnet20(weights=tmp_path / "weights.npz", num_classes=7)


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


CLASS = """
import copy
import jax
import jax.numpy as jnp
import numpy as np

class Mine:
    def __init__(self):
        self.count = 0
        self.average = jnp.zeros(())
        self.history = []

    def setup(self, model):
        {setup}

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch
        {step}
        return {{"loss": step}}
"""
KNOWN = "which is not known while the step is traced"


def check_class(tmp_path, step="pass", setup="pass"):
    """Checks a class with these lines, as `bench.py --method mine.py` does."""
    (tmp_path / "mine.py").write_text(CLASS.format(step=step, setup=setup))
    method = get_method(str(tmp_path / "mine.py"))
    check_rule(method, method.factory(context()), context(), [(4, 4)])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("return {'loss': images.sum().item()}", rf"line 18: .item.*{KNOWN}: .* return a metric as it is"),
        ("return {'loss': float(images.sum())}", rf"line 18: .item.*{KNOWN}: .* return a metric as it is"),
        ("scale = [1, 2][step]", rf"line 18: an index .*{KNOWN}: .* jnp array"),
        ("for _ in range(step): pass", rf"line 18: an index .*{KNOWN}"),
        ("scale = 1 if images.sum() > 0 else 2", rf"line 18: `if`.*{KNOWN}: write jnp.where or jax.lax.cond"),
        ("while step < 3: pass", rf"line 18: `if`.*{KNOWN}: write jnp.where"),
        ("scale = np.asarray(images).sum()", rf"line 18: NumPy .*{KNOWN}: write jnp in place of np"),
        ("model(images).sum().backward()", r"line 18: .backward is PyTorch's: optimizer.step\(closure\) takes"),
        ("optimizer.zero_grad()", r"line 18: .zero_grad is PyTorch's: optimizer.step\(closure\) takes"),
        ("optimizer.param_groups[0]['lr'] = 1", "line 18: .param_groups is PyTorch's: the optimizer is the protocol's"),
        ("model(images).detach()", "line 18: .detach is PyTorch's: write jax.lax.stop_gradient"),
        ("model.requires_grad_(False)", "line 18: .requires_grad_ is PyTorch's: .* leave it out"),
        ("model(images.transpose(0, 3, 1, 2))", r"line 18: a model takes images \[B, 32, 32, 3\], not \[4, 3,"),
        ("loss = images.mean() * np.random.normal()", r"step draws with numpy.random, .* model.random_key\(\)"),
        ("raise ValueError('first\\nsecond')", "line 18: ValueError: first second"),
        ("optimizer.step(lambda: None)", "the closure returns NoneType: it must return the loss"),
        ("optimizer.step(lambda: model(images))", "scalar-output functions"),
        ("kept = []; optimizer.step(lambda: kept.append(model(images)) or kept[0].sum()); step = kept[0].sum()",
         "a value made inside a closure .* is used outside it: return it"),
        ("self.teacher = copy.deepcopy(model)", r"self.teacher holds an array that .*: create it in setup\(self, mo"),
        ("self.history.append(step)", r"self.history holds an array that .*: create it in setup\(self, model\)"),
        ("self.count = self.count + step", r"self.count holds an array that .*: create it in setup\(self, model\)"),
        ("self.count += 1", r"self.count changes in a step, which is traced only once: only arrays that setup"),
        ("self.last = epoch", r"self.last changes in a step, which is traced only once"),
        ("self.average = 1.0", r"self.average changes in a step, which is traced only once"),
        ("del self.average", r"self.average changes in a step, which is traced only once"),
        ("self.average = images.mean(0)", r"self.average changes in a step from float32\[\] to float32\[32, 32, 3\]"),
        ("return step", "it returns .*Tracer: it must return a dict with at least 'loss'"),
        ("return {'loss': 'high'}", "Mine.unlearn_step: TypeError"),
        ("return {'accuracy': step}", "metrics must be a dict with at least 'loss'"),
        ("return {'loss': images}", "metric 'loss' is not a scalar"),
        ("if epoch < 2: return {'loss': step, 'away': step}", r"epochs 0 and 2 differ in what they return: .*'away'"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_refused_in_one_line(tmp_path, step, message):
    with pytest.raises(UserError, match=f"^method 'mine'.*{message}") as caught:
        check_class(tmp_path, step)
    assert "\n" not in str(caught.value)


def test_a_setup_may_draw_with_numpy(tmp_path):
    check_class(tmp_path, setup="self.noise = jnp.asarray(np.random.default_rng(0).normal(size=3))")


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("self.teacher = model", r"self.teacher is the model that learns: write copy.deepcopy\(model\)"),
        ("self.models = {'teacher': [model.eval()]}", "self.models is the model that learns"),
        ("model.reset_parameters()", "Mine.setup changes the model that learns: only a step can do that"),
        ("assert model.params['linear']['bias'][0] == 0", "Mine.setup, line 14: `if`"),
        ("self.count = 1 / 0", "Mine.setup, line 14: ZeroDivisionError"),
    ],
)
def test_a_setup_that_cannot_be_is_refused_in_one_line(tmp_path, setup, message):
    with pytest.raises(UserError, match=f"^method 'mine': {message}"):
        check_class(tmp_path, setup=setup)
