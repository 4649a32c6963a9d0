import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    CLASSES,
    COUNT,
    PROTOCOL,
    assert_close,
    assert_differ,
    counted_reads,
    make_images,
    make_models,
    make_split,
    make_unlearning,
    mesh_of,
    run_epochs,
    seed_of,
    to_rounding,
    unlearn,
    unlearning_of,
)

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.data.batches import normalise
from jaxunlearn.errors import UserError
from jaxunlearn.methods.rule import Pass, UnlearningRule, cross_entropy, init_state
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import Method, get_method
from jaxunlearn.torch_style import UnlearningMethod
from jaxunlearn.training.unlearning import Split, epoch_plan

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
SEEDS = (1, 2)
RULE = "negative_gradient"  # not linear in the batch, two forwards, both kinds of images


def method_of(factory):
    return Method("mine", factory, {}, {})


@pytest.mark.parametrize(
    ("bench", "retain", "forget", "short", "long"),
    [
        ("resnet20-cifar10-class0", 45000, 5000, 40, 352),
        ("vgg16bn-cifar100-class0", 49500, 500, 4, 387),
        ("mobilenetv2-fmnist-class0", 54000, 6000, 47, 422),
    ],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_of_the_official_epochs(bench, retain, forget, short, long, drop_last):
    split = Split(np.arange(retain), np.arange(forget))
    for length, steps in (("min", short), ("retain", long)):
        protocol = dataclasses.replace(get_benchmark(bench), epoch_length=length, drop_last=drop_last)
        plan = epoch_plan(protocol, split)
        assert len(plan) == steps - drop_last
        if drop_last:
            assert set(plan) == {(128, 128)}
        elif length == "min":
            assert plan == [(128, 128)] * (short - 1) + [(128, forget % 128)]
        else:
            assert sum(r for r, _ in plan) == retain
            assert [f for _, f in plan[:short]] == [128] * (short - 1) + [forget % 128]
            assert plan[-1] == (retain % 128, plan[(long - 1) % short][1])


@pytest.mark.parametrize(("retain", "forget", "named"), [(300, 100, "100 forget"), (100, 300, "100 retain")])
def test_an_epoch_without_steps_is_refused(retain, forget, named):
    protocol = dataclasses.replace(get_benchmark("vgg16bn-cifar100-class0"), drop_last=True)
    with pytest.raises(UserError, match=f"no batch .*of the {named} images"):
        epoch_plan(protocol, Split(np.arange(retain), np.arange(forget)))


def logging_rule(context):
    """Learns nothing; writes down what each step was given, an image known by its label."""

    def init(params, batch_stats, key):
        return init_state(context, params, batch_stats, key, extra=jnp.full((10, 2, 8), -1))

    def step(params, state, retain, forget):
        log = state.extra
        for kind, batch in enumerate((retain, forget)):
            log = log.at[state.step, kind, : len(batch.labels)].set(batch.labels * (batch.labels == batch.indices))
        key = jax.random.key_data(state.key)[0]
        metrics = {"loss": jnp.zeros(()), "step": state.step, "epoch": state.epoch, "key": key}
        return params, state._replace(extra=log), metrics

    return UnlearningRule(init, step)


def logged(epoch_length):
    protocol = dataclasses.replace(PROTOCOL, batch_size=8, epoch_length=epoch_length)
    data = make_images()._replace(labels=np.arange(COUNT, dtype=np.int32))
    with jax.set_mesh(mesh_of()):
        run, keys = make_unlearning(method_of(logging_rule), protocol, mesh_of(), data), seed_keys(SEEDS)
        carry, metrics = run_epochs(run, run.start(*make_models(protocol, SEEDS, mesh_of()), keys), keys, 2)
    return run, carry.extra, metrics


def test_every_pass_over_retain_and_forget_is_a_new_order():
    run, log, metrics = logged("retain")
    assert (run.steps_per_epoch, run.images_per_epoch) == (5, 38 + 19 + 16)  # retain 8 8 8 8 6, forget 8 8 3, 8 8
    np.testing.assert_array_equal(metrics["step"], [range(10)] * 2)
    np.testing.assert_array_equal(metrics["epoch"], [[0] * 5 + [1] * 5] * 2)
    assert len(np.unique(metrics["key"])) == 20
    split, orders = make_split(), {"retain": [], "forget": []}
    for seed_log in log:
        for epoch in np.split(seed_log, 2):
            retain, forget, second = epoch[:, 0].ravel(), epoch[:3, 1].ravel(), epoch[3:, 1].ravel()
            np.testing.assert_array_equal(np.sort(retain[retain >= 0]), split.retain)
            np.testing.assert_array_equal(np.sort(forget[forget >= 0]), split.forget)
            assert len(np.unique(second)) == 16 and set(second) < set(split.forget)
            orders["retain"].append(tuple(retain[:16]))
            orders["forget"] += [tuple(forget[:16]), tuple(second)]
    assert [len(set(o)) for o in orders.values()] == [4, 8]


def test_a_short_epoch_is_one_pass_over_forget():
    run, log, _ = logged("min")
    assert (run.steps_per_epoch, run.images_per_epoch) == (3, 24 + 19)
    for epoch in np.concatenate([log[:, :3], log[:, 3:6]]):
        forget = epoch[:, 1].ravel()
        np.testing.assert_array_equal(np.sort(forget[forget >= 0]), make_split().forget)
        assert len(np.unique(epoch[:, 0])) == 24
    assert (log[:, 6:] == -1).all()


@pytest.fixture(scope="module")
def started(tiny_models):
    with jax.set_mesh(mesh_of()):
        return *unlearning_of(RULE, PROTOCOL, SEEDS, mesh_of()), make_models(PROTOCOL, SEEDS, mesh_of())


def test_the_teacher_and_the_given_models_outlive_the_steps(started):
    run, keys, models = started
    with jax.set_mesh(mesh_of()):
        given = jax.tree.map(np.array, models)
        for _ in range(2):
            carry, _ = run_epochs(run, run.start(*models, keys), keys, 2)
    assert_close(models, given, 0)
    assert_close(tuple(carry.extra), given, 0)
    assert_differ(carry.params, given[0])


def test_an_epoch_of_unlearning_fetches_once(started):
    run, keys, models = started
    with jax.set_mesh(mesh_of()):
        carry, _ = run.epoch(run.start(*models, keys), keys, 0)
        with counted_reads() as counts:
            run.epoch(carry, keys, 1)
    assert counts == {"device_get": 1, "other": 0}


def test_unlearning_can_be_resumed(started):
    run, keys, models = started
    with jax.set_mesh(mesh_of()):
        expected, _ = run_epochs(run, run.start(*models, keys), keys, 3)
        half, _ = run_epochs(run, run.start(*models, keys), keys, 1)
        resumed, _ = run_epochs(run, half, keys, 3, first=1)
    assert_close(resumed, expected, 0)


@to_rounding
def test_seeds_together_are_each_seed_alone(protocol, epochs, rtol):
    together = unlearn(RULE, protocol, SEEDS, epochs, mesh_of())
    assert_close(seed_of(together, 1), unlearn(RULE, protocol, SEEDS[1:], epochs, mesh_of()), rtol)


@to_rounding
def test_variants_together_are_each_variant_alone(protocol, epochs, rtol):
    mesh, name = mesh_of(), "forget_weight"
    with jax.enable_x64(protocol.precision == "fp64"), jax.set_mesh(mesh):
        run, keys = make_unlearning(get_method(RULE), protocol, mesh, numbers=[name]), seed_keys(SEEDS)
        assert run.takes_numbers()
        models, numbers = make_models(protocol, SEEDS, mesh), {name: [0.5, 2.0]}  # the first is the default
        carry, metrics = run_epochs(run, run.start(*models, keys, numbers), keys, epochs)
        half, _ = run_epochs(run, run.start(*models, keys, numbers), keys, 1)
        assert epochs == 1 or not assert_close(run_epochs(run, half, keys, epochs, first=1)[0], carry, 0)
        other = make_unlearning(get_method(RULE, {name: "2"}), protocol, mesh)
        alone = run_epochs(other, other.start(*models, keys), keys, epochs)
    assert carry.numbers[name].tolist() == [0.5, 2.0]
    both = carry._replace(numbers=()), metrics
    assert_close(seed_of(both, 0), seed_of(unlearn(RULE, protocol, SEEDS, epochs, mesh), 0), rtol)
    assert_close(seed_of(both, 1), seed_of(alone, 1), rtol)
    assert_differ(carry.params, alone[0].params)


def test_passes_and_prepare_know_a_variants_numbers():
    def rule(context, *, scale: float = 1.0, shift: float = 0.0):
        def prepare(params, state, retain_set, forget_set):
            assert isinstance(shift, float)  # outside jit it is a number
            return jax.tree.map(lambda x: x + shift, params), state

        one = Pass(
            "forget",
            lambda params, state: jnp.zeros(()),
            lambda params, state, carry, batch: carry + scale,
            lambda params, state, carry: (jax.tree.map(lambda x: x * carry, params), state),
        )
        return UnlearningRule(lambda p, b, k: init_state(context, p, b, k), None, prepare, (one,))

    method = Method("mine", rule, {"scale": 1.0, "shift": 0.0}, {"scale": 1.0, "shift": 0.0})
    with jax.set_mesh(mesh_of()):
        run, keys = make_unlearning(method, PROTOCOL, mesh_of(), numbers=["scale", "shift"]), seed_keys(SEEDS)
        models = make_models(PROTOCOL, SEEDS, mesh_of())
        carry = run.start(*models, keys, {"scale": [2.0, 3.0], "shift": [0.0, 1.0]})
        carry, _ = run.epoch(carry, keys, -1)
    expected = jax.tree.map(lambda x: np.stack([2 * x[0], 3 * (x[1] + 1)]), models[0])
    assert_close(jax.device_get(carry.params), expected, 1e-6)


class Shifted(UnlearningMethod):
    """A class whose step needs nothing of what its `prepare` does."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def prepare(self, model, retain_set, forget_set, optimizer):
        model.load_state_dict({name: x + self.shift for name, x in model.state_dict().items()})

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        return {"loss": optimizer.step(lambda: cross_entropy(model(retain_batch[0]), retain_batch[1]))}


def test_a_class_is_not_made_anew_without_its_attributes():
    with jax.set_mesh(mesh_of()):
        run = make_unlearning(get_method(Shifted), PROTOCOL, mesh_of(), numbers=["shift"])
        assert not run.takes_numbers()


@pytest.mark.parametrize(("name", "takes"), [("salun", True), ("ssd", True), ("unsir", True), ("mine", False)])
def test_a_rule_that_looks_at_its_numbers_is_known(name, takes):
    def looks(context, *, weight: float = 1.0):
        inner = get_method(RULE).factory(context)
        return inner if weight > 0 else inner._replace(step=None)

    method = Method("mine", looks, {"weight": 1.0}, {"weight": 1.0}) if name == "mine" else get_method(name)
    floats = [key for key, value in method.defaults.items() if isinstance(value, float)]
    with jax.set_mesh(mesh_of()):
        assert make_unlearning(method, PROTOCOL, mesh_of(), numbers=floats).takes_numbers() is takes


@pytest.mark.parametrize(
    ("precision", "split", "epochs", "rtol"),
    [("fp64", split, 3, 1e-9) for split in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4))]
    + [("fp32", split, 1, 1e-5) for split in ((2, 2), (1, 4))],
)
def test_devices_agree(precision, split, epochs, rtol):
    protocol = dataclasses.replace(PROTOCOL, precision=precision)
    twice = split[0] == 4
    expected = unlearn(RULE, protocol, SEEDS, epochs, mesh_of())
    if twice:
        expected = jax.tree.map(lambda x: np.concatenate([x, x]), expected)
    assert_close(unlearn(RULE, protocol, SEEDS * (1 + twice), epochs, mesh_of(*split)), expected, rtol)


def test_batches_are_augmented_unless_the_protocol_says_otherwise():
    def rule(context):
        def step(params, state, retain, forget):
            return params, state, {"loss": jnp.zeros(()), "retain": retain.images.sum(), "forget": forget.images.sum()}

        return UnlearningRule(lambda params, stats, key: init_state(context, params, stats, key), step)

    def sums(**changes):
        protocol = dataclasses.replace(PROTOCOL, **changes)
        with jax.set_mesh(mesh_of()):
            run, keys = make_unlearning(method_of(rule), protocol, mesh_of()), seed_keys(SEEDS)
            _, metrics = run_epochs(run, run.start(*make_models(protocol, SEEDS, mesh_of()), keys), keys, 1)
        return metrics["retain"], metrics["forget"]

    clean = [np.asarray(normalise(make_images().images[part], PROTOCOL)).sum() for part in make_split()]
    for own, of_all in zip(sums(unlearn_augment=False), clean, strict=True):
        np.testing.assert_allclose(own, np.full((2, 1), of_all), rtol=1e-4)
    for own, of_all in zip(sums(), clean, strict=True):  # zeros around the image are darker than it
        assert (np.abs(own / of_all - 1) > 1e-3).all()


def test_prepare_sees_every_clean_image_once_and_changes_what_the_steps_get():
    seen = []

    def rule(context):
        def init(params, batch_stats, key):
            return init_state(context, params, batch_stats, key, extra=jnp.zeros(()))

        def prepare(params, state, retain_set, forget_set):
            sets = [list(retain_set), list(forget_set)]
            assert [len(retain_set), len(forget_set)] == [len(batches) for batches in sets]
            seen.append((params, sets))
            return jax.tree.map(lambda p: 2 * p, params), state._replace(extra=state.extra + sum(map(len, sets)))

        def step(params, state, retain, forget):
            return params, state, {"loss": jnp.sum(params["linear"]["kernel"]), "batches": state.extra}

        return UnlearningRule(init, step, prepare)

    protocol = dataclasses.replace(PROTOCOL, batch_size=19)
    data = make_images()
    with jax.set_mesh(mesh_of(2, 1)):
        run, keys = make_unlearning(method_of(rule), protocol, mesh_of(2, 1)), seed_keys(SEEDS)
        params, batch_stats = make_models(protocol, SEEDS, mesh_of(2, 1))
        carry, metrics = run_epochs(run, run.start(params, batch_stats, keys), keys, 1)
    assert_close(carry.params, jax.tree.map(lambda p: 2 * np.asarray(p), params), 1e-6)
    np.testing.assert_allclose(metrics["loss"][:, 0], 2 * params["linear"]["kernel"].sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["batches"], 2 + 1)
    assert len(seen) == 2
    for index, (own, sets) in enumerate(seen):
        assert_close(own, jax.tree.map(lambda p, i=index: p[i], params), 0)
        for batches, indices in zip(sets, make_split(), strict=True):
            images, labels = map(np.concatenate, zip(*batches, strict=True))
            np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), indices)
            np.testing.assert_array_equal(images, normalise(jnp.asarray(data.images[indices]), protocol))
            np.testing.assert_array_equal(labels, data.labels[indices])


def test_a_rule_without_steps_is_what_prepare_makes_of_each_seed():
    found = []
    for seeds in (SEEDS, SEEDS[1:]):
        with jax.set_mesh(mesh_of()):
            run, keys = unlearning_of("output_mask", PROTOCOL, seeds, mesh_of())
            run.compile(len(seeds))
            models = make_models(PROTOCOL, seeds, mesh_of())
            found.append(jax.device_get((run.start(*models, keys), models)))
    assert run.epochs == 0 and not run._loop._programs
    (carry, (params, batch_stats)), (alone, _) = found
    bias = np.where(np.arange(CLASSES) == PROTOCOL.forget_class, -np.inf, params["linear"]["bias"])
    expected = params | {"linear": params["linear"] | {"bias": bias}}
    jax.tree.map(np.testing.assert_array_equal, (carry.params, carry.batch_stats), (expected, batch_stats))
    jax.tree.map(np.testing.assert_array_equal, seed_of(carry, 1), alone)
