"""Branches that the epoch decides, taken on the host where XLA would pay for them.

Rules branch on the epoch with `lax.cond`. Inside a conditional, as in a loop, XLA's CPU convolutions miss their fast
path: the gradient of two 3x3 convolutions took 20.6 s there and 0.23 s outside (64 images of 32x32x32, one core). The
host knows the epoch, so on CPU the loop compiles one program for each way the branches can go.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import cond_p, jit_p

UNDECIDED = -1  # a conditional that depends on more than the epoch: it stays one

Branches = tuple[int, ...]

# What a condition on the epoch is made of. Any other operation makes its result unknown, which is safe.
_SCALAR_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "rem": np.fmod,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "not": np.invert,
    "min": min,
    "max": max,
    "clamp": lambda low, x, high: min(max(x, low), high),
    "select_n": lambda which, *cases: cases[int(which)],
}


def decide(program: ClosedJaxpr, epoch: int) -> Branches:
    """The branch each conditional of `program` takes in `epoch`, its first input, in the order `run` meets them."""
    branches: list[int] = []
    unknown = [None] * (len(program.jaxpr.invars) - 1)
    with np.errstate(all="ignore"):  # scalars that decide nothing may overflow
        _decide(program, [np.int32(epoch), *unknown], branches)
    return tuple(branches)


def run(program: ClosedJaxpr, branches: Branches, *inputs: Any) -> list[Any]:
    """The outputs of `program` for flat `inputs`, without the conditionals that `branches` decides."""
    return _run(program, list(inputs), iter(branches))


def _decide(program: ClosedJaxpr, inputs: list[Any], branches: list[int]) -> list[Any]:
    """The scalar outputs of `program` that its known inputs decide, None for the others; appends to `branches`."""
    known: dict[Any, Any] = dict.fromkeys(program.jaxpr.constvars)
    known |= dict(zip(program.jaxpr.invars, inputs, strict=True))
    for equation in program.jaxpr.eqns:
        values = [_value(known, atom) for atom in equation.invars]
        outputs: list[Any] = [None] * len(equation.outvars)
        if equation.primitive is jit_p:
            outputs = _decide(equation.params["jaxpr"], values, branches)
        elif equation.primitive is cond_p:
            ways = equation.params["branches"]
            taken = UNDECIDED if values[0] is None else min(max(int(values[0]), 0), len(ways) - 1)
            branches.append(taken)
            if taken != UNDECIDED:
                outputs = _decide(ways[taken], values[1:], branches)
        elif equation.outvars[0].aval.shape == () and not any(value is None for value in values):
            outputs = [_scalar(equation, values)]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [_value(known, atom) for atom in program.jaxpr.outvars]


def _scalar(equation: Any, values: list[Any]) -> Any:
    if equation.primitive.name == "convert_element_type":
        return np.asarray(values[0]).astype(equation.params["new_dtype"])[()]
    operation = _SCALAR_OPERATIONS.get(equation.primitive.name)
    return operation(*values) if operation else None


def _run(program: ClosedJaxpr, inputs: list[Any], branches: Iterator[int]) -> list[Any]:
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, inputs, strict=True))
    for equation in program.jaxpr.eqns:
        arguments = [_value(values, atom) for atom in equation.invars]
        if equation.primitive is jit_p and _has_conditional(equation.params["jaxpr"]):
            outputs = _run(equation.params["jaxpr"], arguments, branches)
        elif equation.primitive is cond_p and (taken := next(branches)) != UNDECIDED:
            outputs = _run(equation.params["branches"][taken], arguments[1:], branches)
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # a pair in some versions of JAX
            with equation.ctx.manager:  # what was asked for where it was traced, such as not to inline a call
                result = equation.primitive.bind(*functions, *arguments, **parameters)
            outputs = result if equation.primitive.multiple_results else [result]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [_value(values, atom) for atom in program.jaxpr.outvars]


def _has_conditional(program: ClosedJaxpr) -> bool:
    """Whether `_decide` meets one in `program`."""
    return any(
        equation.primitive is cond_p or (equation.primitive is jit_p and _has_conditional(equation.params["jaxpr"]))
        for equation in program.jaxpr.eqns
    )


def _value(values: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else values[atom]
