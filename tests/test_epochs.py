"""One program for all epochs in which a function does the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.torch_style.epochs import switch_epochs

EPOCHS = 4
X = jnp.asarray([0.5, -1.0, 2.0])
FIRST, SECOND = jnp.asarray([1.0, 3.0, 5.0]), jnp.asarray([2.0, 4.0, 8.0])


def stepwise(epoch, x):
    for _ in range(epoch):
        x = x + 1
    return x


FUNCTIONS = {
    "no epoch": (lambda epoch, x: x + 1, 1),
    "the given value": (lambda epoch, x: x, 1),
    "a constant": (lambda epoch, x: 2.0, 1),
    "arithmetic": (lambda epoch, x: x * 0.9**epoch + epoch, 1),
    "a constant or another": (lambda epoch, x: 1.0 if epoch < 2 else 0.0, 1),
    "a list": (lambda epoch, x: x * [1.0, 2.0, 4.0, 8.0][epoch], 1),
    "an array": (lambda epoch, x: x + np.arange(3) * epoch, 1),
    "an array of the device": (lambda epoch, x: x * FIRST, 1),
    "one array or another": (lambda epoch, x: x * (FIRST if epoch < 2 else SECOND), 1),
    "not a number": (lambda epoch, x: x * float("nan"), 1),
    "an argument of a jitted function": (lambda epoch, x: jnp.where(x > 0, x, float(epoch)), 1),
    "custom derivatives": (lambda epoch, x: jax.nn.relu(x) + jax.nn.softmax(x) * epoch, 1),
    "a gradient": (lambda epoch, x: jax.grad(lambda x: epoch * (x**2).sum())(x), 1),
    "if": (lambda epoch, x: 2 * x if epoch < 2 else x, 2),
    "other operands": (lambda epoch, x: x[0] - x[1] if epoch < 2 else x[1] - x[0], 2),
    "another dtype inside": (lambda epoch, x: x.astype(jnp.int32 if epoch < 1 else x.dtype).sum() * 1.0, 2),
    "for": (stepwise, 4),
    "a parameter": (lambda epoch, x: jnp.roll(x, epoch)[:1] + jax.lax.integer_pow(x[0], epoch), 4),
    "a constant in a branch": (lambda epoch, x: jax.lax.cond(x[0] > 0, lambda: x * epoch, lambda: x), 4),
    "a callback": (
        lambda epoch, x: jax.pure_callback(lambda x: x + np.float32(epoch), x, x, vmap_method="sequential"),
        4,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_epoch_is_its_own_and_only_programs_that_differ_are_compiled(name):
    function, programs = FUNCTIONS[name]
    switched = switch_epochs(function, EPOCHS)
    mapped = jax.jit(jax.vmap(switched, (None, 0)))
    for epoch in range(EPOCHS):
        values = [jnp.asarray(function(epoch, x)) for x in (X, 2 * X)]
        np.testing.assert_allclose(mapped(jnp.int32(epoch), jnp.stack([X, 2 * X])), jnp.stack(values), rtol=1e-6)
    switches = [e for e in jax.make_jaxpr(switched)(jnp.int32(0), X).eqns if e.primitive.name == "cond"]
    assert [len(switch.params["branches"]) for switch in switches] == ([programs] if programs > 1 else [])


def test_many_programs_are_warned_of():
    with pytest.warns(UserWarning, match=r"the step is 5 different programs in 6 epochs, and each is compiled"):
        jax.eval_shape(switch_epochs(lambda epoch, x: stepwise(min(epoch, 4), x), 6), jnp.int32(0), X)


@pytest.mark.parametrize(
    "function",
    [
        lambda epoch, x: {"a": x} if epoch < 2 else {"b": x},
        lambda epoch, x: {"a": x} if epoch < 2 else {"a": x, "b": x},
        lambda epoch, x: {"a": x if epoch < 2 else x[0]},
        lambda epoch, x: {"a": x if epoch < 2 else x.astype(int)},
    ],
)
def test_epochs_return_the_same_form(function):
    with pytest.raises(UserError, match=r"^epochs 0 and 2 differ in what they return: \['[ab]'\]"):
        jax.eval_shape(switch_epochs(function, EPOCHS), jnp.int32(0), X)
