"""BatchNorm's statistics: PyTorch's, and as exact as float32 allows. Its gradients are in test_layers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from test_layers import random

from jaxunlearn.models.layers import BatchNorm
from jaxunlearn.ops import normalization
from jaxunlearn.ops.normalization import EPS, batch_norm

pytestmark = [pytest.mark.numbers, pytest.mark.usefixtures("full_precision")]


def test_batch_norm_keeps_pytorch_statistics():
    x = 3 + 2 * random(4, 5, 5, 6)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    flat = np.asarray(x, np.float64).reshape(-1, 6)
    np.testing.assert_allclose(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), rtol=0, atol=1e-5)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)

    after = {**variables, **updates}
    expected = (flat - stats["mean"]) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    np.testing.assert_allclose(norm.apply(after, x, train=False).reshape(-1, 6), expected, rtol=0, atol=1e-5)


def test_batch_variance_does_not_cancel():
    x = 1000 + random(64, 4, 4, 3)
    _, mean, var = batch_norm(x, jnp.ones(3), jnp.zeros(3), None, jnp.zeros(3), False)
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, flat.var(0), rtol=1e-4)


@pytest.mark.parametrize("moved", [0.0, 1.0, 10.0])  # deviations
def test_the_variance_of_one_pass_does_not_cancel_near_the_running_mean(moved, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = 1000 + random(64, 4, 4, 3)
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    near = jnp.asarray(flat.mean(0) + moved, jnp.float32)
    y, mean, var = jax.jit(lambda x: batch_norm(x, jnp.ones(3), jnp.zeros(3), None, near, False))(x)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, flat.var(0), rtol=4e-6 * (1 + moved**2))  # var is E[left^2] - moved^2
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + EPS)
    np.testing.assert_allclose(y.reshape(-1, 3), expected, atol=1e-3)


def test_the_batchs_sums_are_one_pass_off_the_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def reads(near):
        """How many sums of the images depend on a sum of them."""
        x = jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.float32)
        channel = jnp.zeros(3)
        program = jax.make_jaxpr(lambda x: normalization._forward(x, channel, channel, None, near, relu=False))(x)
        late, count = set(), 0
        for equation in program.eqns:
            after = any(v in late for v in equation.invars if not isinstance(v, Literal))
            is_sum = equation.primitive.name == "reduce_sum"
            count += is_sum and after
            late |= set(equation.outvars) if after or is_sum else set()
        return count

    assert (reads(jnp.zeros(3)), reads(None)) == (0, 1)


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    x = random(16, 4, 4, 8).astype(jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, train=False)
    y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updates))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(
        updates["batch_stats"]["mean"], 0.1 * np.asarray(x, np.float32).mean((0, 1, 2)), atol=1e-6
    )
