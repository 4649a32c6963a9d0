"""A class of the PyTorch harness as a rule."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn.data.batches import Batch
from jaxunlearn.errors import UserError, one_line
from jaxunlearn.methods.rule import Context, RuleState, UnlearningRule, init_state
from jaxunlearn.models.network import Network
from jaxunlearn.torch_style.attributes import Attributes, Rest, first_attributes, join, next_arrays
from jaxunlearn.torch_style.epochs import ESCAPED, switch_epochs
from jaxunlearn.torch_style.interface import Optimizer
from jaxunlearn.torch_style.models import Generator, Model, jitted

PyTree = Any

LEARNS = "optimizer.step(closure) takes the gradient of the loss that the closure returns: leave it out"
FIXED = "the optimizer is the protocol's and cannot be changed"
NO_GRADIENT = "only the model that learns has a gradient: leave it out"
INSTEAD = {  # what PyTorch has and JAX has not
    "backward": LEARNS,
    "zero_grad": LEARNS,
    "param_groups": FIXED,
    "requires_grad_": NO_GRADIENT,
    "requires_grad": NO_GRADIENT,
    "detach": "write jax.lax.stop_gradient",
}


class Outcome(NamedTuple):
    """What a step leaves."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    extra: dict[str, list[jax.Array]]
    metrics: dict[str, jax.Array]


def as_rule(cls: type[Any]) -> Callable[..., UnlearningRule]:
    """Makes a rule's factory of a class with an `unlearn_step`: see `UnlearningMethod`.

    `RuleState.extra` has the arrays on `self`, a list for each name. Where the class cannot be traced, `init` and
    `step` raise UserError, which says where and what to write.

    Raises TypeError where `__init__` takes other arguments than named ones.
    """

    @functools.wraps(cls, updated=())
    def factory(context: Context, **hyperparameters: Any) -> UnlearningRule:
        # Jitted, so that tracing a step again for each epoch costs next to nothing.
        network = jitted(Network(context.initialise, context.apply_train, context.apply_eval))
        adam = context.optimizer._replace(update=jax.jit(context.optimizer.update))
        generator = Generator(jax.random.key(0))  # of the step that is traced: `init` and `at_epoch` set its key
        rest: dict[str, Rest] = {}  # the attributes without their arrays, as `init` has left them

        def init(params: PyTree, batch_stats: PyTree, key: jax.Array) -> RuleState:
            nonlocal rest
            generator.key = key
            model = Model(network, params, batch_stats, generator)
            with explained(cls, "__init__"):
                method = cls(**hyperparameters)
            if hasattr(method, "setup"):
                with explained(cls, "setup"):
                    method.setup(model)
            if model.params is not params:
                raise UserError(f"{cls.__name__}.setup changes the model that learns: only a step can do that")
            extra, rest = first_attributes(method, model)
            return init_state(context, params, model.batch_stats, key, extra)

        def at_epoch(epoch: int, params: PyTree, state: RuleState, retain: Batch, forget: Batch) -> Outcome:
            generator.key = state.key
            model = Model(network, params, state.batch_stats, generator)
            method: Any = object.__new__(cls)
            vars(method).update({name: join(state.extra[name], rest[name]) for name in rest})
            optimizer = Optimizer(adam, state.opt_state, model, (model, method, generator))
            with explained(cls, "unlearn_step"):
                metrics = method.unlearn_step(model, retain, forget, optimizer, state.step, epoch)
                if not isinstance(metrics, dict):
                    raise UserError(f"it returns {type(metrics).__name__}: it must return a dict with at least 'loss'")
                metrics = {name: jnp.asarray(value) for name, value in metrics.items()}
                metrics = {name: v.astype(jnp.promote_types(v.dtype, jnp.float32)) for name, v in metrics.items()}
                extra = next_arrays(method, Attributes(state.extra, rest))
            return Outcome(model.params, model.batch_stats, optimizer.state, extra, metrics)

        def step(params: PyTree, state: RuleState, retain: Batch, forget: Batch) -> tuple[PyTree, RuleState, Any]:
            known = state._replace(epoch=jnp.zeros((), jnp.int32))  # a program must not depend on the traced one
            after = switch_epochs(at_epoch, context.epochs)(state.epoch, params, known, retain, forget)
            state = state._replace(batch_stats=after.batch_stats, opt_state=after.opt_state, extra=after.extra)
            return after.params, state, after.metrics

        return UnlearningRule(init, step)

    parameters = list(inspect.signature(cls).parameters.values())
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise TypeError(f"write {cls.__name__}.__init__(self, hyperparameters with defaults)")
    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    factory.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]
    return factory


@contextmanager
def explained(cls: type[Any], part: str) -> Iterator[None]:
    """Makes a UserError of whatever a method of the class raises: the line, and what to write in its place."""
    try:
        yield
    except Exception as error:
        function = getattr(cls, part)
        file = function.__code__.co_filename if hasattr(function, "__code__") else None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f"{cls.__name__}.{part}" + (f", line {lines[-1]}" if lines else "")
        raise UserError(f"{place}: {advice(error)}") from error


def advice(error: Exception) -> str:
    """What to write instead of what has failed, where that is known; else what has failed."""
    unknown = "which is not known while the step is traced"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            f"`if`, `while`, `and` and `or` ask for the value of an array, {unknown}: write jnp.where or jax.lax.cond"
        )
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return f"NumPy asks for the values of an array, {unknown}: write jnp in place of np"
    if isinstance(error, jax.errors.TracerIntegerConversionError):
        return f"an index of a list and a range ask for the value of an array, {unknown}: index a jnp array"
    if isinstance(error, jax.errors.ConcretizationTypeError):
        what = ".item(), float() and int() ask for the value of an array"
        return f"{what}, {unknown}: keep the array, and return a metric as it is"
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return ESCAPED
    if isinstance(error, AttributeError) and error.name in INSTEAD:
        return f".{error.name} is PyTorch's: {INSTEAD[error.name]}"
    return one_line(error)
