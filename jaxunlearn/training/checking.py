"""The contract of rules, checked on a user's own before anything is computed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.data.batches import Batch
from jaxunlearn.errors import UserError, one_line
from jaxunlearn.methods.rule import SETS, Context, Pass, RuleState, UnlearningRule
from jaxunlearn.randomness import abstract_key
from jaxunlearn.registry import Method
from jaxunlearn.training.host_draws import watched_draws

LEAK = "it uses an array of an earlier call: what is kept belongs into RuleState.extra"
SEED_AXES: Any = RuleState(0, 0, 0, 0, None, None)  # type: ignore[arg-type]
DRAWN = (
    "{} draws with {}, which gives the same numbers in every step and for every seed: "
    "use jax.random with state.key, in a class with model.random_key()"
)


def check_rule(method: Method, rule: UnlearningRule, context: Context, sizes: Sequence[tuple[int, int]]) -> None:
    """Traces a rule on abstract batches of `sizes` (retain, forget), for seeds together, as it runs.

    Raises UserError, in one line, where it does not keep the contract.
    """
    try:
        if rule.step is None and rule.prepare is None and not rule.passes:
            raise TypeError("it has neither step nor prepare nor passes")
        if isinstance(rule.passes, Pass) or not all(isinstance(one, Pass) for one in rule.passes):
            raise TypeError("its passes must be a tuple of Pass")
        key = abstract_key()
        params, batch_stats = jax.eval_shape(context.initialise, key)
        for pair in sizes if len(sizes) > 1 else [*sizes] * 2:  # the second meets what the first has left behind
            state = jax.eval_shape(jax.vmap(rule.init), *map(_one_seed, (params, batch_stats, key)))
            if not isinstance(state, RuleState):
                raise TypeError(f"init returned {type(state).__name__}, it must return a RuleState")
            same_form("init", ("batch_stats", batch_stats, _alone(state.batch_stats)))
            state = state._replace(step=_alone(state.step), epoch=_alone(state.epoch))
            for number, one in enumerate(rule.passes, 1):
                _check_pass(f"pass {number}", one, params, state, pair[0])
            if rule.step is None:
                continue
            together = jax.vmap(rule.step, (0, SEED_AXES, 0, 0))
            batches = (_one_seed(_abstract_batch(size)) for size in pair)
            with watched_draws() as drawn:
                program, result = jax.make_jaxpr(together, return_shape=True)(_one_seed(params), state, *batches)
            if drawn:
                raise TypeError(DRAWN.format("step", min(drawn)))
            if any(isinstance(constant, jax.core.Tracer) for constant in program.consts):
                raise TypeError(LEAK)
            if not isinstance(result, tuple) or len(result) != 3:
                raise TypeError("step must return (params, state, metrics)")
            same_form("step", ("params", params, _alone(result[0])), ("state", _state(state), _alone(result[1])))
            metrics = _alone(result[2])
            if not isinstance(metrics, dict) or "loss" not in metrics:
                raise TypeError("step's metrics must be a dict with at least 'loss'")
            if wrong := [name for name, value in metrics.items() if value.shape != () or not _is_real(value)]:
                raise TypeError(f"step's metric '{wrong[0]}' is not a scalar, or no real number")
    except KeyboardInterrupt:
        raise
    except jax.errors.UnexpectedTracerError as error:
        raise UserError(f"method '{method.name}' does not keep the rule contract: {LEAK}") from error
    except UserError as error:
        raise UserError(f"method '{method.name}': {error}") from error
    except BaseException as error:  # a user's code may raise SystemExit
        raise UserError(f"method '{method.name}' does not keep the rule contract: {one_line(error)}") from error


def traces(rule_of: Callable[[Any], UnlearningRule], context: Context, sizes: tuple[int, int], numbers: Any) -> bool:
    """Whether all parts of a rule can be traced with abstract `numbers`, each part of a rule that is made anew, and
    keep the form of what they change. A class does not whose attributes the one that is made anew does not know.

    Whatever fails so is to be run with numbers that are known, where what is wrong with it can be said.
    """

    def parts(params: Any, batch_stats: Any, key: jax.Array, numbers: Any, *batches: Batch) -> Any:
        state = rule_of(numbers).init(params, batch_stats, key)
        for number in range(len(rule_of(numbers).passes)):
            carry = rule_of(numbers).passes[number].init(params, state)
            carry = rule_of(numbers).passes[number].step(params, state, carry, batches[0])
            params, state = rule_of(numbers).passes[number].finish(params, state, carry)
        if step := rule_of(numbers).step:
            after = step(params, state, *batches)
            same_form("step", ("params", params, after[0]), ("state", state, after[1]))
        return params, state

    key = abstract_key()
    try:
        jax.eval_shape(parts, *jax.eval_shape(context.initialise, key), key, numbers, *map(_abstract_batch, sizes))
    except Exception:
        return False
    return True


def _check_pass(name: str, one: Pass, params: Any, state: RuleState, size: int) -> None:
    """The same for a pass; `state` is that of seeds together, `params` one seed's."""
    if one.over not in SETS:
        raise TypeError(f"{name} is over '{one.over}': write retain, forget or all")
    for field in ("images", "batch_size"):
        number = getattr(one, field)
        if number is not None and not (isinstance(number, int) and number > 0):
            raise TypeError(f"{name}: its {field} is {number}, it must be None or a whole number from 1 on")

    def traced(function: Any, *arguments: Any) -> Any:
        axes = (0, SEED_AXES, *[0] * len(arguments))
        return jax.eval_shape(jax.vmap(function, axes), _one_seed(params), state, *arguments)

    with watched_draws() as drawn:
        carry = traced(one.init)
        for batch in {one.batch_size or size, 1}:  # the last one is smaller
            after = traced(one.step, carry, _one_seed(_abstract_batch(batch)))
            same_form(f"{name}: step", ("the carry", _alone(carry), _alone(after)))
        result = traced(one.finish, carry)
    if drawn:
        raise TypeError(DRAWN.format(name, min(drawn)))
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{name}: finish must return (params, state)")
    changes = ("params", params, _alone(result[0])), ("state", _state(state), _alone(result[1]))
    same_form(f"{name}: finish", *changes)


def _state(together: RuleState) -> RuleState:
    """One seed's, of the state of seeds together."""
    return RuleState(*_alone(together[:4]), together.step, together.epoch)  # type: ignore[call-arg]


def _abstract_batch(size: int) -> Batch:
    return jax.eval_shape(lambda: Batch(jnp.zeros((size, 32, 32, 3)), *jnp.zeros((2, size), jnp.int32)))


def _is_real(value: Any) -> bool:
    return any(jnp.issubdtype(value.dtype, kind) for kind in (np.bool_, np.integer, np.floating))


def _one_seed(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)


def _alone(tree: Any) -> Any:
    """Shapes without the seed axis that `vmap` put in front."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def same_form(what: str, *trees: tuple[str, Any, Any]) -> None:
    """Raises TypeError where `what` changed the structure, a shape or a dtype: trees are (name, before, after)."""
    for name, before, after in trees:
        if str(jax.tree.structure(before)) != str(jax.tree.structure(after)):
            raise TypeError(f"{what} changed the structure of {name}")
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                old_form, new_form = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (old, new))
                raise TypeError(f"{what} changed {name} from {old_form} to {new_form}")
