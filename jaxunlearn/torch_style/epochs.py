"""A function of the epoch as a Python int, at a traced one.

`if epoch < 2` needs a Python int, a compiled step has a traced i32. So the function is traced once for every epoch,
which is cheap where its heavy parts are jitted, and only the programs that differ are compiled.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jaxunlearn.errors import UserError

ESCAPED = (
    "a value made inside a closure (or inside lax.cond, jax.grad, ...) is used outside it: "
    "return it from there, as in `loss, logits = optimizer.step(closure)`; inside jax.grad a model is in eval mode, "
    "and one that is not on `self` is always"
)
MOST_PROGRAMS = 4  # without a warning

# What a function with custom derivatives carries of them, made anew in every trace. The step is not differentiated.
DERIVATIVES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")


class Program(NamedTuple):
    """What a function does in one epoch: a jaxpr whose first inputs are its constants, and their values."""

    epoch: int
    jaxpr: Jaxpr
    constants: list[Any]


def switch_epochs(function: Callable[..., Any], epochs: int) -> Callable[..., Any]:
    """Makes of `function(epoch, *arguments)` for a Python int the same for a traced i32 scalar below `epochs`.

    Epochs in which the function performs the same operations share a program. The constants in which they differ,
    such as the weight `0.9 ** epoch`, are then read from a table. Where several programs are left, `lax.switch`
    chooses one, which stays a branch under `vmap` as long as the epoch is not batched.

    Raises:
      UserError: epochs differ in the structure, shapes or dtypes of what they return, or a value of a transformation
        that has ended is used.
    """

    def switched(epoch: jax.Array, *arguments: Any) -> Any:
        groups: dict[Hashable, list[Program]] = {}
        for number in range(epochs):
            closed, outputs = jax.make_jaxpr(partial(function, number), return_shape=True)(*arguments)
            if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
                raise UserError(ESCAPED)
            if number == 0:
                first = outputs
            elif changed := sorted(_paths(first) ^ _paths(outputs)):
                raise UserError(f"epochs 0 and {number} differ in what they return: {changed[0]}")
            program = Program(number, *_without_constants(closed))
            groups.setdefault(_operations(program.jaxpr), []).append(program)
        if len(groups) > MOST_PROGRAMS:
            message = f"the step is {len(groups)} different programs in {epochs} epochs, and each is compiled"
            warnings.warn(f"{message}: `if` and `for` on the epoch make them, arithmetic does not", stacklevel=2)
        branches = [_branch(programs, epochs) for programs in groups.values()]
        operands = (epoch, *jax.tree.leaves(arguments))
        if len(branches) == 1:
            leaves = branches[0](*operands)
        else:
            chosen = {program.epoch: i for i, programs in enumerate(groups.values()) for program in programs}
            index = jnp.asarray([chosen[number] for number in range(epochs)])[epoch]
            leaves = jax.lax.switch(index, branches, *operands)
        return jax.tree.unflatten(jax.tree.structure(first), leaves)

    return switched


def _paths(shapes: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _branch(programs: list[Program], epochs: int) -> Callable[..., list[Any]]:
    """The one program of epochs that differ in constants at most, as a function (epoch, *leaves) -> leaves."""
    jaxpr = programs[0].jaxpr
    rows = np.zeros(epochs, np.int32)
    rows[[program.epoch for program in programs]] = np.arange(len(programs))

    def branch(epoch: jax.Array, *leaves: Any) -> list[Any]:
        constants = []
        for variable, *values in zip(jaxpr.invars, *(program.constants for program in programs), strict=False):
            if len(set(map(_bits, values))) == 1:
                constants.append(values[0])
            else:
                dtype = variable.aval.dtype
                table = jnp.stack([v if isinstance(v, jax.Array) else jnp.asarray(v, dtype) for v in values])
                constants.append(table[jnp.asarray(rows)[epoch]])
        return jax.core.eval_jaxpr(jaxpr, (), *constants, *leaves)

    return branch


def _without_constants(program: Any) -> tuple[Jaxpr, list[Any]]:
    """A jaxpr of a ClosedJaxpr with its constants as further inputs, before the others; and their values."""
    jaxpr = getattr(program, "jaxpr", program)
    inputs, values = list(jaxpr.constvars), list(getattr(program, "consts", ()))

    def variable(atom: Any) -> Var:
        if not isinstance(atom, Literal):
            return atom
        inputs.append(Var(atom.aval))
        values.append(atom.val)
        return inputs[-1]

    equations = [eqn.replace(invars=[variable(atom) for atom in eqn.invars]) for eqn in jaxpr.eqns]
    outputs = [variable(atom) for atom in jaxpr.outvars]
    return jaxpr.replace(constvars=[], invars=[*inputs, *jaxpr.invars], eqns=equations, outvars=outputs), values


def _operations(jaxpr: Jaxpr) -> Hashable:
    """Equal for two jaxprs without constants that perform the same operations. Where in doubt, not equal."""
    numbers: dict[Any, int] = {}

    def names(variables: Sequence[Any]) -> Hashable:
        return tuple(numbers.setdefault(variable, len(numbers)) for variable in variables)

    head = (names(jaxpr.invars), tuple(variable.aval for variable in jaxpr.invars))
    equations = tuple((names(eqn.invars), eqn.primitive, _settings(eqn), names(eqn.outvars)) for eqn in jaxpr.eqns)
    return head, equations, names(jaxpr.outvars)


def _settings(eqn: Any) -> Hashable:
    ignored = DERIVATIVES if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call") else ()
    return tuple((name, _setting(value)) for name, value in eqn.params.items() if name not in ignored)


def _setting(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return tuple(map(_setting, value))
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return _Nested(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


class _Nested:
    """A jaxpr inside another. Mostly a cached one, which is told by its identity; else its operations are compared."""

    def __init__(self, program: Any):
        self._program = program

    def _description(self) -> Hashable:
        jaxpr, constants = _without_constants(self._program)
        return _operations(jaxpr), tuple(map(_bits, constants))

    def __hash__(self) -> int:
        return len(self._program.eqns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Nested):
            return False
        return self._program is other._program or self._description() == other._description()


def _bits(value: Any) -> Hashable:
    """Equal for equal numbers, NaN among them; an array that may be large or far away equals itself only."""
    if isinstance(value, jax.Array):
        return id(value)
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()
