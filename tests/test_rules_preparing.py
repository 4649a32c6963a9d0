"""Rules that look at the data, or learn images, before the first step: each against its equation, by numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import (
    CLASSES,
    FORGET,
    RATE,
    RETAIN,
    STUDENT,
    TEACHER,
    context,
    network,
    rule_of,
    single,
    slope,
    start,
    student,
)
from linear import cross_entropy as ce

from jaxunlearn.ingredients.labels import random_labels
from jaxunlearn.methods.rule import Student
from jaxunlearn.methods.unsir import rule as unsir

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]  # compiles in less time
SMALL, LARGE = (jax.tree.map(lambda x, part=part: jnp.asarray(x[part]), FORGET) for part in (slice(1), slice(1, 5)))
ON_DEVICE = [jax.tree.map(jnp.asarray, batch) for batch in (RETAIN, FORGET)]


def test_salun_moves_the_half_of_the_weights_that_the_forget_set_asks_for_most():
    rule = rule_of("salun")
    (sums,), params, state = rule.passes, single(TEACHER[0]), start(rule)
    total = sums.init(params, state)
    for batch in (SMALL, LARGE):
        total = jax.jit(sums.step)(params, state, total, batch)
    _, state = sums.finish(params, state, total)

    def forget_loss(params):
        return ce(network(params, TEACHER[1], np.asarray(FORGET.images, np.float64), False)[0], FORGET.labels)

    slopes = jax.tree.map(np.abs, slope(forget_loss, TEACHER[0]))
    middle = np.median(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(slopes)]))
    mask = jax.tree.map(lambda leaf: leaf >= middle, slopes)
    jax.tree.map(np.testing.assert_array_equal, state.extra, mask)

    drawn = random_labels(Student(context(), None, state).random_key(), FORGET.labels, CLASSES)

    def loss(params):
        (logits, forget_logits), _ = student(params, RETAIN, FORGET)
        return ce(logits, RETAIN.labels) + ce(forget_logits, drawn)

    params, _, metrics = jax.jit(rule.step)(single(STUDENT[0]), state, *ON_DEVICE)
    np.testing.assert_allclose(metrics["loss"], loss(STUDENT[0]), rtol=1e-5)
    expected = jax.tree.map(lambda x, g, on: x - RATE * g * on, STUDENT[0], slope(loss, STUDENT[0]), mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), params, expected)


def corner(images):
    """What the network of these tests sees of whole images."""
    return images[:, :2, :2]


def of_corners():
    """The context of a network that sees the corners of whole images."""
    given = context(forget_class=2)
    return given._replace(
        apply_eval=lambda params, stats, images: given.apply_eval(params, stats, corner(images)),
        apply_train=lambda params, stats, images, key: given.apply_train(params, stats, corner(images), key),
    )


def test_unsir_learns_images_away_from_the_forgotten_class():
    rule = unsir(of_corners(), images=2, steps=3)
    before = start(rule)
    after = rule.prepare(single(TEACHER[0]), before, [], [])[1].extra
    noise = np.asarray(before.extra, np.float64)
    first = second = np.zeros_like(noise)
    for step in range(1, 4):

        def loss(seen, noise=noise):
            return 0.1 * (seen**2).sum() / 2 - ce(network(*TEACHER, seen, False)[0], [2, 2])

        gradient = 0.1 * noise
        gradient[:, :2, :2] = slope(loss, corner(noise))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        noise = noise - 0.1 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(after, noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("epochs", "steps"), [(8, 3), (1, 24)])  # a single epoch is divided too
def test_unsir_impairs_in_its_first_steps_then_repairs(epochs, steps):
    rule = unsir(of_corners()._replace(epochs=epochs, steps_per_epoch=steps), images=2, impair=0.25)
    step, before = jax.jit(rule.step), start(rule)
    padded = jnp.pad(ON_DEVICE[0].images, ((0, 0), (0, 30), (0, 30), (0, 0)))
    retain = dataclasses.replace(ON_DEVICE[0], images=padded)
    repaired = np.asarray(RETAIN.images, np.float64), RETAIN.labels
    learned = corner(np.asarray(before.extra, np.float64)), [2, 2]
    impaired = [np.concatenate(pair) for pair in zip(repaired, learned, strict=True)]
    for number, (images, labels) in ((5, impaired), (6, repaired)):  # of 24
        state = before._replace(step=jnp.int32(number), epoch=jnp.int32(number // steps))
        metrics = step(single(STUDENT[0]), state, retain, ON_DEVICE[1])[2]
        logits, _ = network(STUDENT[0], TEACHER[1], images, True)
        np.testing.assert_allclose(metrics["loss"], ce(logits, labels), rtol=1e-5)
