"""The contract of an unlearning rule, and the small pieces that rules are written with.

A rule file has one module-level name, `rule`: a factory `rule(context, *, hyperparameters with defaults)` that
returns an `UnlearningRule`, much as an optax transformation does. Most rules are only a loss: `loss_rule` makes a
factory from it. Everything here is for one seed; the loop vmaps it over seeds and shards it over devices.

Beside `rule` a file may say between what ends tuning looks for a hyperparameter: `ranges = {"share": (0.1, 0.9)}`.
Where it says nothing of a number, `jaxunlearn.tuning.ranges` says what is taken.

The docstring of the file, or of the function, says which training images the rule reads, in one sentence that, of one
that ships, `--list` shows: "Reads: retain, forget images, a pass over all." Each part is retain, forget or (of a pass)
all, with " images" behind it where the labels are not read; or the whole is "nothing". A rule that ships says in two
more what it changed from its paper or submission and whose the values of its hyperparameters are: "Differs: ..." and
"Values: ...".
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Metrics = dict[str, jax.Array]
Loss = jax.Array | tuple[jax.Array, Metrics]

SETS = ("retain", "forget", "all")  # of training images, for a pass to go over


class Context(NamedTuple):
    """What a rule may know of the run: the model's functions, the fixed optimizer and the sizes.

    Images are f32[B, 32, 32, 3], normalised; logits are f32[B, classes].
    """

    apply_train: Callable[..., tuple[jax.Array, PyTree]]  # (params, batch_stats, images, key) -> (logits, batch_stats)
    apply_eval: Callable[..., jax.Array]  # (params, batch_stats, images) -> logits
    initialise: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> fresh (params, batch_stats)
    forward: Callable[..., Any]  # either mode, and features: see `jaxunlearn.models.network.Network`
    layers: Callable[[], tuple[str, ...]]  # names of the layers with parameters, in the order in which they compute
    optimizer: optax.GradientTransformation
    learning_rate: float  # of the optimizer, Adam: gradients far below its `eps` are multiplied by learning_rate / eps
    eps: float
    mean: tuple[float, ...]  # of pixels scaled to 0-1, one a channel: images are (pixels - mean) / std
    std: tuple[float, ...]
    num_classes: int
    forget_class: int
    steps_per_epoch: int
    epochs: int


class RuleState(NamedTuple):
    """Everything that changes beside the parameters. The first four belong to one seed; the last two to all."""

    batch_stats: PyTree  # BatchNorm's running statistics, which the evaluator reads
    opt_state: PyTree  # Adam's moments
    key: jax.Array  # fresh in every step: a function of (seed, epoch, step)
    extra: PyTree  # whatever the rule keeps: a teacher, a mask, an average
    step: jax.Array  # i32 scalar, steps done in all; written by the loop
    epoch: jax.Array  # i32 scalar, from 0; written by the loop


class Pass(NamedTuple):
    """One look at many images before the first step, run as steps are: jitted, on seeds together and on all devices,
    saved on the way and timed apart. Images are not augmented.

    Params and state are those at the start of the pass, with a fresh `key` in every call; only `finish` changes them.
    `state.step` is the number of batches done in this pass. The last batch has the size that is left.

    init:   (params, state) -> carry, any tree of arrays
    step:   (params, state, carry, batch) -> carry
    finish: (params, state, carry) -> (params, state)
    """

    over: str  # one of `SETS`, whose images are seen once each, in file order
    init: Callable[[PyTree, RuleState], PyTree]
    step: Callable[..., PyTree]
    finish: Callable[[PyTree, RuleState, PyTree], tuple[PyTree, RuleState]]
    images: int | None = None  # at most so many, drawn from the set for each seed, in a random order; None: all
    batch_size: int | None = None  # 1 where each image is looked at alone; None: the protocol's


class UnlearningRule(NamedTuple):
    """A rule: two pure functions, and what rules need that look at the data before the first step.

    A rule whose `step` is None takes no steps: `prepare` and the passes are all that changes the model.

    init:    (params, batch_stats, key) -> RuleState
    step:    (params, state, retain, forget) -> (params, state, metrics); jitted, metrics are f32 scalars with "loss"
    prepare: (params, state, retain_set, forget_set) -> (params, state); called once, outside jit. A set is iterated
             for its clean batches, in file order: `for images, labels in retain_set`. For a few batches: nothing of
             it is compiled or saved on the way. `state.key` is what init had: where both draw, fold a number into it.
    passes:  what goes over a whole set, one after the other, behind `prepare`
    """

    init: Callable[..., RuleState]
    step: Callable[..., tuple[PyTree, RuleState, Metrics]] | None
    prepare: Callable[..., tuple[PyTree, RuleState]] | None = None
    passes: tuple[Pass, ...] = ()


class Frozen(NamedTuple):
    """A model that no longer learns: a teacher."""

    params: PyTree
    batch_stats: PyTree


class Student:
    """The model that learns, inside one loss. Calling it is a forward in train mode.

    Like a PyTorch module it updates its BatchNorm statistics with each call, in the order of the calls; it lives
    only while the loss is traced, so the rule around it stays pure.
    """

    def __init__(self, context: Context, params: PyTree, state: RuleState):
        self.context = context
        self.state = state
        self.params = params
        self.batch_stats = state.batch_stats
        self.key = state.key

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of `images` in train mode; the running statistics move."""
        self.key, key = jax.random.split(self.key)
        logits, self.batch_stats = self.context.apply_train(self.params, self.batch_stats, images, key)
        return logits

    def teacher(self, images: jax.Array) -> jax.Array:
        """Logits of the model as it was before the first step, in eval mode. For rules made by `loss_rule`."""
        return teach(self.context, self.state.extra, images)

    def random_key(self) -> jax.Array:
        """A key of this step that nothing else uses, to draw with."""
        self.key, key = jax.random.split(self.key)
        return key


def teach(context: Context, teacher: Frozen, images: jax.Array) -> jax.Array:
    """Logits of a frozen model in eval mode; no gradient flows into it."""
    return jax.lax.stop_gradient(context.apply_eval(teacher.params, teacher.batch_stats, images))


def init_state(context: Context, params: PyTree, batch_stats: PyTree, key: jax.Array, extra: PyTree = ()) -> RuleState:
    """The state before the first step: Adam's moments at zero."""
    zero = jnp.zeros((), jnp.int32)
    return RuleState(batch_stats, context.optimizer.init(params), key, extra, zero, zero)


def descend(
    context: Context, params: PyTree, state: RuleState, loss: Callable[[Student], Loss]
) -> tuple[PyTree, RuleState, Metrics]:
    """One step of the fixed optimizer down `loss(student)`: a scalar, or a pair of it and further metrics.

    Returns (params, state, metrics before the step: "loss" and the further ones).
    """

    gradients, state, metrics = differentiate(context, params, state, loss)
    return *update(context, params, state, gradients), metrics


def loss_rule(loss: Callable[..., Loss]) -> Callable[..., UnlearningRule]:
    """Makes a rule's factory of a loss `(student, retain, forget, *, hyperparameters) -> scalar`, or a pair of the
    scalar and a dict of further metrics, f32 scalars that progress shows."""

    @functools.wraps(loss)
    def factory(context: Context, **hyperparameters: Any) -> UnlearningRule:
        def init(params: PyTree, batch_stats: PyTree, key: jax.Array) -> RuleState:
            return init_state(context, params, batch_stats, key, extra=Frozen(params, batch_stats))

        def step(params: PyTree, state: RuleState, retain: Any, forget: Any) -> tuple[PyTree, RuleState, Metrics]:
            return descend(context, params, state, lambda student: loss(student, retain, forget, **hyperparameters))

        return UnlearningRule(init, step)

    parameters = list(inspect.signature(loss).parameters.values())
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(parameters) != len(keywords) + 3:
        raise TypeError("write the loss as rule(student, retain, forget, *, hyperparameters with defaults)")
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    factory.__signature__ = inspect.Signature([context, *keywords])  # type: ignore[attr-defined]
    return factory


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits f32[B, C] and labels i32[B]: a scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the batch whose largest logit, f32[B, C], is that of the label, i32[B]: a scalar."""
    return (logits.argmax(-1) == labels).mean()


def kl_divergence(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(t || s) of target probabilities f32[B, C] and the student's logits f32[B, C]: summed over classes, mean
    over the batch. A target of exactly 0 contributes 0."""
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), targets).mean()


def differentiate(
    context: Context, params: PyTree, state: RuleState, loss: Callable[[Student], Loss]
) -> tuple[PyTree, RuleState, Metrics]:
    """Gradients of `loss(student)`, a scalar or a pair as for `descend`, for rules that put several together.

    Returns (gradients, state, metrics). In the state BatchNorm's statistics have moved and the key is another, so the
    next loss of the same step can go on from it; where a loss is to leave no trace, its state is dropped.
    """

    def objective(params: PyTree) -> tuple[jax.Array, tuple[Metrics, tuple[PyTree, jax.Array]]]:
        student = Student(context, params, state)
        result = loss(student)
        value, metrics = result if isinstance(result, tuple) else (result, {})
        return value, ({"loss": value} | metrics, (student.batch_stats, student.key))

    gradients, (metrics, (batch_stats, key)) = jax.grad(objective, has_aux=True)(params)
    return gradients, state._replace(batch_stats=batch_stats, key=key), metrics


def update(context: Context, params: PyTree, state: RuleState, gradients: PyTree) -> tuple[PyTree, RuleState]:
    """One step of the fixed optimizer with given gradients: (params, state)."""
    updates, opt_state = context.optimizer.update(gradients, state.opt_state, params)
    return optax.apply_updates(params, updates), state._replace(opt_state=opt_state)


def supervised(batch: Any) -> Callable[[Student], tuple[jax.Array, Metrics]]:
    """A batch's own labels as a loss for `descend` or `differentiate`: mean cross-entropy, and "accuracy"."""

    def loss(student: Student) -> tuple[jax.Array, Metrics]:
        logits = student(batch.images)
        return cross_entropy(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}

    return loss


def relabelled(student: Student, retain: Any, forget: Any, labels: jax.Array) -> Loss:
    """CE(retain) + CE(forget, labels), i32[B] in place of forget's own, and "accuracy" on retain, which goes first."""
    loss, metrics = supervised(retain)(student)
    return loss + cross_entropy(student(forget.images), labels), metrics
