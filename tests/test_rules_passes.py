"""What the rules compute that change the model before any step, by numpy."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from linear import (
    CLASSES,
    Model,
    cross_entropy,
    gradient,
    in_numpy,
    linear_batch,
    linear_context,
    linear_model,
    log_softmax,
    vector,
)

from jaxunlearn.methods import fisher, lfssd, ssd, wood_fisher

pytestmark = [pytest.mark.usefixtures("in_float64", "quick_compilation"), pytest.mark.numbers]
BATCHES = {
    "retain": [linear_batch(1, seed) for seed in range(3)],
    "forget": [linear_batch(5, 1, labels=0), linear_batch(3, 2, labels=0)],
    "all": [linear_batch(6, 0), linear_batch(4, 3)],
}


def seen(one, params, state):
    """(the state, what a pass carries) after its batches."""
    carry, step = one.init(params, state), jax.jit(one.step)
    for number, batch in enumerate(BATCHES[one.over]):
        carry = step(params, state._replace(step=jnp.int32(number)), carry, batch)
    return state._replace(step=jnp.int32(len(BATCHES[one.over]))), carry


def passed(rule, params, stats):
    """The parameters after all passes of a rule that takes no step."""
    assert rule.step is None
    state = rule.init(params, stats, jax.random.key(0))
    for one in rule.passes:
        params, state = jax.jit(one.finish)(params, *seen(one, params, state))
    return in_numpy(params)


def importance(params, stats, over, loss, measure):
    """The mean over the batches of measure(gradient of loss(logits, labels)): a Model."""

    def of_batch(batch):
        return gradient(lambda m: loss(m.in_eval_mode(batch, stats["bn"]["mean"]), batch.labels), in_numpy(params))

    return Model(*(np.mean(measure(np.stack(arrays)), 0) for arrays in zip(*map(of_batch, BATCHES[over]), strict=True)))


@pytest.mark.parametrize(
    ("rule", "loss", "measure"),
    [
        (ssd.rule, cross_entropy, np.square),
        (lfssd.rule, lambda logits, labels: (logits**2).sum(-1).mean(), np.abs),
    ],
)
def test_weights_that_matter_more_for_forget_are_dampened(rule, loss, measure):
    params, stats = linear_model(1)
    everything, forgotten = (importance(params, stats, over, loss, measure) for over in ("all", "forget"))
    ratios = np.concatenate([(f / e).ravel() for e, f in zip(everything, forgotten, strict=True)])
    alpha = float(np.median(ratios))
    dampening = 1.3 * alpha  # less than some of the chosen, more than others
    dampened = passed(rule(linear_context(), alpha=alpha * (1 + 1e-6), dampening=dampening), params, stats)
    factors = []
    for old, new, e, f in zip(in_numpy(params), dampened, everything, forgotten, strict=True):
        factor = np.where(f > alpha * (1 + 1e-6) * e, np.minimum(dampening * e / f, 1), 1)
        np.testing.assert_allclose(new, factor * old, rtol=1e-5)
        factors.append(factor.ravel())
    assert (np.concatenate(factors) == 1).any() and (np.concatenate(factors) < 1).any()


def test_what_matters_for_neither_stays():
    """Zero gradients, as of a feature that no image has, are no reason to change a weight, or for a NaN."""
    params, stats = jax.tree.map(jnp.zeros_like, linear_model(1)[0]), linear_model(1)[1]
    after = passed(lfssd.rule(linear_context(), alpha=0.0), params, stats)
    assert not after.kernel.any() and not after.bias.any()


def test_fisher_adds_noise_where_it_costs_least():
    """Over its deviation the noise of any settings, of limits that bind and not, is the same, and of variance 1."""
    params, stats = linear_model(1)
    mean, information = stats["bn"]["mean"], Model(0.0, 0.0)
    for batch in BATCHES["retain"]:
        for label in range(CLASSES):
            slope = gradient(lambda m, b=batch, y=label: log_softmax(m.in_eval_mode(b, mean))[0, y], in_numpy(params))
            p = np.exp(log_softmax(in_numpy(params).in_eval_mode(batch, mean))[0, label])
            information = Model(*(total + p * g**2 / 3 for total, g in zip(information, slope, strict=True)))
    limit = float(np.median(1 / information.kernel))
    keys = jax.random.split(jax.random.key(0), 4000)

    def drawn(alpha, limit):
        rule = fisher.rule(linear_context(), alpha=alpha, largest_of_head=limit)
        (one,) = rule.passes
        state, carry = seen(one, params, rule.init(params, stats, keys[0]))
        after = jax.jit(jax.vmap(lambda key: one.finish(params, state._replace(key=key), carry)[0]["head"]))(keys)
        variance = Model(*(10 * alpha * np.minimum(1 / (f + 1e-8), limit) for f in information))
        variance = variance._replace(kernel=np.broadcast_to(variance.kernel.mean(0), variance.kernel.shape))
        forgotten = np.arange(CLASSES) == 0  # of which nothing is left but noise
        return [
            (new - np.where(forgotten, 0, old)) / np.sqrt(np.where(forgotten, 10 * 1e-4, v))
            for new, old, v in zip((after["kernel"], after["bias"]), in_numpy(params), variance, strict=True)
        ]

    for one, two in zip(drawn(1e-4, limit), drawn(1e-2, 1e9), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
        np.testing.assert_allclose(one.mean(0), 0, atol=0.08)  # five deviations of what 4,000 draws give
        np.testing.assert_allclose((one**2).mean(0), 1, atol=0.11)


def test_wood_fisher_takes_one_step_along_what_its_recursion_makes_of_two_gradients():
    params, stats = linear_model(1)
    mean = stats["bn"]["mean"]

    def slope(batch):
        return vector(gradient(lambda m: cross_entropy(m.in_eval_mode(batch, mean), batch.labels), in_numpy(params)))

    def of_set(name):
        sizes = [len(batch.labels) for batch in BATCHES[name]]
        return np.average([slope(batch) for batch in BATCHES[name]], 0, sizes), sum(sizes)

    (forget, n_f), (retain, n_r) = of_set("forget"), of_set("retain")
    k = n_f / (n_f + n_r) * (forget - retain)
    first, *others = [slope(batch) for batch in BATCHES["retain"]]  # each of one image
    o = first
    for g in others:
        length = 3 + o @ g
        k, o = k - (k @ g) / length * o, o - (o @ g) / length * o
    after = passed(wood_fisher.rule(linear_context(), alpha=3.0, images=3), params, stats)
    np.testing.assert_allclose(vector(after) - vector(in_numpy(params)), 3 * k, rtol=1e-6, atol=1e-8)
    *sums, last = wood_fisher.rule(linear_context(), images=3).passes
    assert [(one.over, one.images, one.batch_size) for one in sums] == [("forget", None, None), ("retain", None, None)]
    assert (last.over, last.images, last.batch_size) == ("retain", 3, 1)


def test_fisher_looks_at_images_one_by_one():
    for images, expected in ((0, None), (7, 7)):
        (one,) = fisher.rule(linear_context(), images=images).passes
        assert (one.over, one.images, one.batch_size) == ("retain", expected, 1)


def test_fishers_noise_of_each_kind_of_tensor():
    """Alike for all inputs of a kernel's feature; ten times the variance in vectors and in the head."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "bn": (4,), "head": (4, CLASSES)}
    information = {name: rng.uniform(0.05, 1, shape) for name, shape in shapes.items()}
    nothing = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rule = fisher.rule(linear_context(), alpha=0.01, largest=5.0, largest_of_head=3.0)
    state = rule.init(*linear_model(1), jax.random.key(0))._replace(step=jnp.int32(2))
    flat, like_params = jax.flatten_util.ravel_pytree(nothing)
    noise = like_params(jax.random.normal(state.key, flat.shape, flat.dtype))
    after, _ = rule.passes[0].finish(nothing, state, {name: 2 * fisher for name, fisher in information.items()})
    limits = {"conv": 5.0, "bn": 5.0, "head": 3.0}
    variance = {name: 0.01 * np.minimum(1 / (information[name] + 1e-8), limit) for name, limit in limits.items()}
    expected = {
        "conv": np.broadcast_to(variance["conv"].mean(2, keepdims=True), shapes["conv"]),
        "bn": 10 * variance["bn"],
        "head": np.broadcast_to(10 * variance["head"].mean(0), shapes["head"]),
    }
    kept = {"conv": slice(None), "bn": slice(None), "head": slice(1, None)}  # the head's first class is the forgotten
    for name, which in kept.items():
        drawn = np.asarray(after[name] / noise[name]) ** 2
        np.testing.assert_allclose(drawn[..., which], expected[name][..., which], rtol=1e-6)
