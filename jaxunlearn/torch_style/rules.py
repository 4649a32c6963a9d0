"""A class of the PyTorch harness as a rule."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn.data.batches import Batch
from jaxunlearn.errors import UserError
from jaxunlearn.methods.rule import Context, RuleState, UnlearningRule, init_state
from jaxunlearn.models.network import Network
from jaxunlearn.randomness import seed_key
from jaxunlearn.torch_style.advice import PREPARE, check_parts, explained
from jaxunlearn.torch_style.attributes import Attributes, Rest, first_attributes, join, next_arrays
from jaxunlearn.torch_style.epochs import switch_epochs
from jaxunlearn.torch_style.interface import Optimizer
from jaxunlearn.torch_style.models import Generator, Model, jitted

PyTree = Any


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
        network = jitted(Network(*(getattr(context, name) for name in Network._fields)))
        adam = context.optimizer._replace(update=jax.jit(context.optimizer.update))
        generator = Generator(seed_key(0))  # of the step that is traced: `init` and `at_epoch` set its key
        rest: dict[str, Rest] = {}  # the attributes without their arrays, as `init` has left them

        def init(params: PyTree, batch_stats: PyTree, key: jax.Array) -> RuleState:
            nonlocal rest
            generator.key = key
            model = Model(network, params, batch_stats, generator)
            with explained(cls, "__init__"):
                method = cls(**hyperparameters)
            check_parts(method)
            if hasattr(method, "setup"):
                with explained(cls, "setup"):
                    method.setup(model)
            if model.params is not params:
                place = f"only a step can do that, or {PREPARE}"
                raise UserError(f"{cls.__name__}.setup changes the model that learns: {place}")
            extra, rest = first_attributes(method, model)
            return init_state(context, params, model.batch_stats, key, extra)

        def resume(params: PyTree, state: RuleState) -> tuple[Model, Any, Optimizer]:
            """What the class works with, as the state has it."""
            model = Model(network, params, state.batch_stats, generator)
            method: Any = object.__new__(cls)
            vars(method).update({name: join(state.extra[name], rest[name]) for name in rest})
            return model, method, Optimizer(adam, state.opt_state, model, (model, method, generator))

        def prepare(params: PyTree, state: RuleState, retain_set: Any, forget_set: Any) -> tuple[PyTree, RuleState]:
            generator.key = jax.random.fold_in(state.key, 1)  # `init` has drawn from the key itself
            model, method, optimizer = resume(params, state)
            with explained(cls, "prepare"):
                method.prepare(model, retain_set, forget_set, optimizer)
                extra = next_arrays(method, Attributes(state.extra, rest))
            state = state._replace(batch_stats=model.batch_stats, opt_state=optimizer.state, extra=extra)
            return model.params, state

        def at_epoch(epoch: int, params: PyTree, state: RuleState, retain: Batch, forget: Batch) -> Outcome:
            generator.key = state.key
            model, method, optimizer = resume(params, state)
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

        return UnlearningRule(init, step, prepare if getattr(cls, "prepare", None) else None)

    parameters = list(inspect.signature(cls).parameters.values())
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise TypeError(f"write {cls.__name__}.__init__(self, hyperparameters with defaults)")
    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    factory.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]
    return factory
