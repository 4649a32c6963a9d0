"""The contract that every registered rule keeps, and what each baseline computes, by numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reading import FORGET, RETAIN, prepared
from safetensors.numpy import load_file
from tiny import CLASSES, PLAIN, PROTOCOL, assert_close, assert_differ, host_models, make_batch

from jaxunlearn.data.batches import normalise
from jaxunlearn.methods.rule import RuleState, Student, init_state
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.models.weight_files import write_safetensors
from jaxunlearn.registry import BASELINES, REFERENCES, RETRAIN, build_rule, get_method, names
from jaxunlearn.training.checking import same_form
from jaxunlearn.training.unlearning import make_context

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]
# The rules that change the model before any step, and take none.
WITHOUT_STEP = {"output_mask", "ssd", "lfssd", "fisher", "wood_fisher"}
# The rules whose steps leave BatchNorm's statistics alone, and those whose steps change what they keep.
FROZEN_STATISTICS = {"adaptive_uniform", "masked_distillation"}
CHANGING_EXTRA = {"importance_masked", "fisher_pcgrad", "gdr_gma", "masked_distillation"}
every_rule = pytest.mark.parametrize("name", sorted({*names()} - WITHOUT_STEP))  # every one that takes steps
every_method = pytest.mark.parametrize("name", names())
SEED_AXES = RuleState(0, 0, 0, 0, None, None)  # step and epoch are one for all seeds


@functools.cache
def context():
    protocol = dataclasses.replace(PROTOCOL, model=PLAIN)  # no dropout: numpy can follow
    return make_context(make_network(protocol, CLASSES), protocol, CLASSES, 1)


@functools.cache
def model(index):
    """One of two models: (params, batch_stats)."""
    return jax.tree.map(jnp.asarray, host_models(dataclasses.replace(PROTOCOL, model=PLAIN), index))


@functools.cache
def forwards():
    """The model's functions, compiled: (apply_train, apply_eval)."""
    return jax.jit(context().apply_train), jax.jit(context().apply_eval)


@functools.cache
def compiled(name, **settings):
    """A rule's step, jitted."""
    return jax.jit(build_rule(get_method(name, settings), context()).step)


def started(name, teacher=0, epoch=0, **settings):
    """The state before the first step of a rule that starts from model `teacher`."""
    rule = build_rule(get_method(name, settings), context())
    state = rule.init(*model(teacher), jax.random.key(3))
    return prepared(rule, model(teacher)[0], state)[1]._replace(epoch=jnp.int32(epoch))


def stepped(name, student=1, retain=RETAIN, forget=FORGET, **options):
    """(params, state, metrics) of one step of model `student`, while the teacher is another model."""
    settings = {k: v for k, v in options.items() if k not in ("teacher", "epoch")}
    return compiled(name, **settings)(model(student)[0], started(name, **options), retain, forget)


def test_the_baselines_are_registered():
    assert set(BASELINES) <= set(names())
    assert "rule" not in names()
    assert get_method(RETRAIN).factory is None
    assert not {*BASELINES} & {*REFERENCES} and {*REFERENCES} <= {*names(), RETRAIN}


@every_rule
def test_a_step_keeps_shapes_and_moves_finite_values(name):
    before = started(name, epoch=1)._replace(step=jnp.int32(5))
    params, state, metrics = compiled(name)(model(1)[0], before, RETAIN, FORGET)
    for old, new in ((model(1)[0], params), (before, state)):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(old)] == [(x.shape, x.dtype) for x in jax.tree.leaves(new)]
    numbers = (params, state.batch_stats, state.opt_state, metrics)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(numbers))
    assert "loss" in metrics and all(value.shape == () for value in metrics.values())
    assert (state.step, state.epoch) == (5, 1)
    assert_differ(params, model(1)[0])
    for changes, new, old in (
        (name not in FROZEN_STATISTICS, state.batch_stats, before.batch_stats),
        (name in CHANGING_EXTRA, state.extra, before.extra),  # a teacher never does
    ):
        assert_differ(new, old) if changes else assert_close(jax.tree.leaves(new), jax.tree.leaves(old), 0)


def test_who_takes_no_step_is_said():
    assert {name for name in names() if build_rule(get_method(name), context()).step is None} == WITHOUT_STEP


@every_method
def test_what_comes_before_the_first_step_keeps_shapes_and_what_takes_no_step_changes_the_model(name):
    rule = build_rule(get_method(name), context())
    before = model(0)[0], rule.init(*model(0), jax.random.key(3))
    after = prepared(rule, *before)
    same_form("it", ("all", before, after))
    if name in WITHOUT_STEP:
        assert_differ((before[0], before[1].batch_stats), (after[0], after[1].batch_stats))


@every_rule
def test_forgetting_moves_what_the_model_says_of_the_forgotten(name):
    (params, stats), state = model(0), started(name)
    before = forwards()[1](params, stats, FORGET.images)
    for _ in range(10):
        params, state, metrics = compiled(name)(params, state, RETAIN, FORGET)
    after = forwards()[1](params, state.batch_stats, FORGET.images)
    assert np.abs(after - before).max() > 1e-3
    assert np.isfinite(metrics["loss"])


@every_rule
def test_the_loss_goes_down_on_the_same_batch(name):
    params, state, losses = model(1)[0], started(name, epoch=2), []  # scrub climbs in epochs 0 and 1
    for _ in range(10):
        params, state, metrics = compiled(name)(params, state, RETAIN, FORGET)
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]


@every_rule
def test_seeds_in_one_vmap_are_each_seed_alone(name):
    rule = build_rule(get_method(name), context())
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *(make_batch(7, 10 * k + s) for s in range(2))) for k in (1, 2)]
    states = [started(name, teacher=index) for index in range(2)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)._replace(step=jnp.int32(0), epoch=jnp.int32(0))
    mapped = jax.jit(jax.vmap(rule.step, (0, SEED_AXES, 0, 0), (0, SEED_AXES, 0)))
    params, state, metrics = mapped(jax.tree.map(lambda *x: jnp.stack(x), model(0)[0], model(1)[0]), together, *batches)
    for index in range(2):
        one = [jax.tree.map(lambda x, i=index: x[i], tree) for tree in (*batches, params, state[:2], metrics)]
        alone = compiled(name)(model(index)[0], states[index], *one[:2])
        assert_close(tuple(one[2:]), (alone[0], alone[1][:2], alone[2]), 1e-5)


def test_an_output_mask_hides_a_class_and_changes_nothing_else(tmp_path):
    rule = build_rule(get_method("output_mask"), context())
    assert rule.step is None
    (params, stats), state = model(0), rule.init(*model(0), jax.random.key(3))
    masked, after = rule.prepare(params, state, [], [])
    expected = np.array(forwards()[1](params, stats, FORGET.images))
    expected[:, 0] = -np.inf
    np.testing.assert_array_equal(forwards()[1](masked, after.batch_stats, FORGET.images), expected)
    assert np.isfinite(params["linear"]["bias"]).all()
    write_safetensors(tmp_path / "w.safetensors", to_state_dict({"params": masked, "batch_stats": stats}))
    np.testing.assert_array_equal(load_file(tmp_path / "w.safetensors")["linear.bias"], masked["linear"]["bias"])


# What the baselines compute.


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def ce(logits, batch):
    return -log_softmax(logits)[np.arange(len(batch.labels)), np.asarray(batch.labels)].mean()


def kl(teacher, student, temperature=1.0):
    log_t, log_s = log_softmax(np.asarray(teacher) / temperature), log_softmax(np.asarray(student) / temperature)
    return temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(-1).mean()


def forward(images, stats=None, index=1):
    """Logits of a model in train mode, and the BatchNorm statistics after it: by default the teacher's moved."""
    return forwards()[0](model(index)[0], model(0)[1] if stats is None else stats, images, jax.random.key(0))


@pytest.mark.parametrize("name", BASELINES)
def test_the_accuracy_is_that_of_the_retain_batch_in_train_mode(name):
    images = np.concatenate([RETAIN.images, FORGET.images]) if name == "bad_teacher" else RETAIN.images
    predicted = forward(images)[0].argmax(-1)[: len(RETAIN.labels)]
    metrics = stepped(name, epoch=2)[2]  # in epochs 0 and 1 scrub has stepped away before
    np.testing.assert_allclose(metrics["accuracy"], (predicted == RETAIN.labels).mean(), rtol=1e-6)


def teach(images):
    """Logits of the teacher in eval mode."""
    return forwards()[1](*model(0), images)


def test_retain_finetune_is_cross_entropy_on_retain():
    _, state, metrics = stepped("retain_finetune")
    logits, stats = forward(RETAIN.images)
    np.testing.assert_allclose(metrics["loss"], ce(logits, RETAIN), rtol=1e-5)
    assert_close(state.batch_stats, stats, 1e-5)


def test_negative_gradient_climbs_on_forget_and_moves_batch_norm_twice():
    _, state, metrics = stepped("negative_gradient")
    retain_logits, once = forward(RETAIN.images)
    forget_logits, twice = forward(FORGET.images, once)
    expected = ce(retain_logits, RETAIN) - 0.5 * ce(forget_logits, FORGET)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_close(state.batch_stats, twice, 1e-5)
    assert_differ(forward(RETAIN.images, forward(FORGET.images)[1])[1], twice)


@pytest.mark.parametrize("reset_bn", ["false", "true"])
def test_bad_teacher_copies_one_teacher_on_retain_and_a_random_one_on_forget(reset_bn):
    _, state, metrics = stepped("bad_teacher", reset_bn=reset_bn)
    random_params, fresh_stats = context().initialise(jax.random.key(3))
    stats = fresh_stats if reset_bn == "true" else model(0)[1]
    assert_close(tuple(state.extra[0]), model(0), 0)
    assert_close(tuple(state.extra[1]), (random_params, stats), 1e-6)
    assert_differ(random_params, model(0)[0])
    targets = [teach(RETAIN.images), forwards()[1](random_params, stats, FORGET.images)]
    logits, moved = forward(jnp.concatenate([RETAIN.images, FORGET.images]))  # one forward, so one BatchNorm batch
    np.testing.assert_allclose(metrics["loss"], kl(np.concatenate(targets), logits), rtol=1e-4)
    assert_close(state.batch_stats, moved, 1e-5)


def test_scrub_stays_near_the_teacher_on_retain():
    _, state, metrics = stepped("scrub", epoch=2, temperature="2", gamma="0.5", alpha="1")
    logits, stats = forward(RETAIN.images)
    expected = 0.5 * ce(logits, RETAIN) + kl(teach(RETAIN.images), logits, 2)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    assert_close(state.batch_stats, stats, 1e-5)


@pytest.mark.parametrize(("epoch", "updates"), [(0, 2), (1, 2), (2, 1), (19, 1)])
def test_scrub_makes_a_second_update_in_its_first_two_epochs(epoch, updates):
    params, state, _ = stepped("scrub", epoch=epoch)
    assert optax.tree_utils.tree_get(state.opt_state, "count") == updates
    others, *_ = stepped("scrub", epoch=epoch, forget=make_batch(5, seed=2))
    assert_differ(params, others) if updates == 2 else assert_close(params, others, 0)


def test_scrub_leaves_the_teacher_on_forget():
    """Its first epochs, with the updates of later ones and another before each, take it further away."""
    distances = []
    for epoch in (0, 2):
        params, state = model(0)[0], started("scrub", epoch=epoch)
        for _ in range(3):
            params, state, _ = compiled("scrub")(params, state, RETAIN, FORGET)
        logits, _ = forwards()[0](params, model(0)[1], FORGET.images, jax.random.key(0))
        distances.append(kl(teach(FORGET.images), logits, 4.0))
    assert distances[0] > distances[1]


def test_a_rule_is_told_how_pixels_became_images():
    pixels = np.full((1, 32, 32, 3), 51, np.uint8)
    expected = (pixels / 255 - context().mean) / context().std
    np.testing.assert_allclose(normalise(jnp.asarray(pixels), PROTOCOL), expected, rtol=1e-5)


def test_a_student_draws_new_dropout_with_every_forward():
    tiny = make_context(make_network(PROTOCOL, CLASSES), PROTOCOL, CLASSES, 1)
    student = Student(tiny, model(0)[0], init_state(tiny, *model(0), jax.random.key(0)))
    first, second = student(RETAIN.images), student(RETAIN.images)
    assert (first != second).any()
