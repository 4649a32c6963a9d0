"""Conditionals on the epoch are resolved; everything else is left as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.xla_metadata import set_xla_metadata

from jaxunlearn import branches


def conditionals(function, *inputs):
    return str(jax.make_jaxpr(function)(*inputs)).count("cond[")


def nested(epoch, x):
    """Three conditionals on the epoch, one of them inside another, and one on the data."""

    def early(x):
        return jax.lax.switch(jnp.mod(epoch, 3), [jnp.sin, jnp.cos, jnp.tanh], x)

    x = jax.lax.cond((epoch >= 2) & ~(epoch == 5), lambda x: x + 1, early, x)
    x = jax.jit(lambda x: jax.lax.cond(jnp.where(epoch < 4, 0, 1) > 0, jnp.abs, jnp.negative, x))(x)
    return jax.lax.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x / 2, x)


@pytest.mark.parametrize("epoch", range(8))
def test_resolved_program_computes_the_same(epoch):
    x = jnp.linspace(-1, 2, 7)
    program = jax.make_jaxpr(nested)(0, x)
    chosen = branches.decide(program, epoch)

    def resolved(epoch, x):
        return branches.run(program, chosen, epoch, x)

    np.testing.assert_array_equal(jax.jit(resolved)(epoch, x)[0], jax.jit(nested)(epoch, x))
    assert conditionals(nested, 0, x) == 4 and conditionals(resolved, 0, x) == 1  # the one on the data stays


def test_epochs_that_go_the_same_way_share_a_program():
    program = jax.make_jaxpr(nested)(0, jnp.ones(3))
    ways = [branches.decide(program, epoch) for epoch in range(8)]
    assert ways[2] == ways[3] and ways[6] == ways[7]
    assert len({ways[e] for e in (0, 1, 2, 4, 5)}) == 5


def test_a_program_without_conditionals_has_one_way():
    program = jax.make_jaxpr(lambda epoch, x: x * jnp.exp(-epoch))(0, jnp.ones(3))
    assert branches.decide(program, 0) == branches.decide(program, 19) == ()


def test_gradients_and_custom_rules_pass_through():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (twice(x), None), lambda _, g: (3 * g,))  # wrong on purpose: to be seen

    def function(epoch, x):
        return jax.lax.cond(epoch < 1, lambda x: jax.grad(lambda x: twice(x).sum())(x), lambda x: twice(x), x)

    program = jax.make_jaxpr(function)(0, jnp.ones(2))
    for epoch, expected in ((0, 3.0), (1, 2.0)):
        (result,) = branches.run(program, branches.decide(program, epoch), epoch, jnp.ones(2))
        assert result.tolist() == [expected, expected]


def test_calls_that_are_not_to_be_inlined_stay_calls():
    def function(epoch, x):
        with set_xla_metadata(inlineable="false"):
            x = jax.jit(jnp.sin)(x)
        return jax.lax.cond(epoch < 1, jnp.cos, jnp.tanh, x)

    program = jax.make_jaxpr(function)(0, jnp.ones(2))

    def resolved(epoch, x):
        return branches.run(program, branches.decide(program, 0), epoch, x)

    assert 'inlineable = "false"' in jax.jit(resolved).lower(0, jnp.ones(2)).as_text()
