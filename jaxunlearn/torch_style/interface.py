"""What a method of the PyTorch harness is and is given: the class, its step, the optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import optax

from jaxunlearn.data.batches import Batch
from jaxunlearn.errors import UserError
from jaxunlearn.torch_style.attributes import join, put, split
from jaxunlearn.torch_style.models import Model, replaced

PyTree = Any
NO_MODEL = "the closure's loss does not depend on the model: call model(images) in the closure, not before it"


class Optimizer:
    """The harness's Adam: one for all steps, at the protocol's learning rate."""

    def __init__(self, adam: optax.GradientTransformation, state: PyTree, model: Model, owners: tuple[Any, ...]):
        self.state = state
        self._adam = adam
        self._model = model
        self._owners = owners  # the objects whose arrays a closure may replace

    def step(self, closure: Callable[[], Any]) -> Any:
        """One update of the model against the gradient of `closure()`, which calls the model and returns the loss.

        The closure may return a tuple that begins with the loss. Returns what it returned, as of before the update.
        Raises UserError where the loss was made outside of it: it has no gradient.
        """
        result, gradients = self.gradients(closure)
        self.update(gradients)
        return result

    def gradients(self, closure: Callable[[], Any]) -> tuple[Any, dict[str, jax.Array]]:
        """The first half of `step`: (what `closure()` returned, the gradients of the parameters by name)."""
        rest: Any = None

        def objective(params: PyTree) -> tuple[jax.Array, Any]:
            nonlocal rest
            self._model.params = params
            result = closure()
            loss = result[0] if isinstance(result, tuple) else result
            if not isinstance(loss, jax.Array):
                raise TypeError(f"the closure returns {type(loss).__name__}: it must return the loss")
            if type(loss) is not type(jax.tree.leaves(params)[0]):  # what depends on them is traced as they are
                raise UserError(NO_MODEL)
            # What it has replaced belongs to the trace of the gradient, and leaves it as a result.
            arrays, rest = split([vars(owner) for owner in self._owners])
            return loss, (result, arrays)

        params = self._model.params
        (_, (result, arrays)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        for owner, attributes in zip(self._owners, join(arrays, rest), strict=True):
            vars(owner).update({name: put(vars(owner)[name], value) for name, value in attributes.items()})
        self._model.params = params
        return result, self._model.named(gradients)

    def update(self, gradients: Mapping[str, jax.Array]) -> None:
        """The second half of `step`: one update of the model against `gradients`, one for each name.

        Raises UserError for a name that is missing or none of a parameter's, and an array of another shape.
        """
        params = self._model.params
        if wrong := sorted(gradients.keys() ^ self._model.named(params).keys()):
            raise UserError(f"optimizer.update(gradients) takes one gradient for each parameter: see '{wrong[0]}'")
        updates, self.state = self._adam.update(replaced(params, gradients), self.state, params)
        self._model.params = optax.apply_updates(params, updates)


class UnlearningMethod:
    """A method of the PyTorch harness. A class with such an `unlearn_step` need not inherit from it.

    The arguments of `__init__`, all with defaults, are the hyperparameters: `--set NAME.KEY=VALUE`. The JAX arrays
    that are on `self` after `setup`, those of models included, are carried from step to step, and a step may replace
    them by others of the same shape. Nothing else on `self` may change in a step.

    A class may also have a `prepare(self, model, retain_set, forget_set, optimizer)`, which looks at the data before
    the first step. A set is iterated for its batches, not augmented and in file order, as often as wanted. It runs once
    for each seed and is not traced; like a step it may change the model and the arrays on `self`.
    """

    prepare: ClassVar[Callable[..., None] | None] = None

    def setup(self, model: Model) -> None:
        """Runs once, before the first step, for what is kept: `self.teacher = copy.deepcopy(model).eval()`."""

    def unlearn_step(
        self,
        model: Model,
        retain_batch: Batch,
        forget_batch: Batch,
        optimizer: Optimizer,
        step: jax.Array,
        epoch: int,
    ) -> dict[str, Any]:
        """One step.

        Args:
          model: the model that learns, in train mode.
          retain_batch: (images f32[B, 32, 32, 3], normalised, labels i32[B]).
          forget_batch: the same, of the class to forget.
          optimizer: its `step(closure)` is called once or several times.
          step: i32 scalar, the steps done in all; traced.
          epoch: from 0. Arithmetic on it is free; every way that an `if` or a `for` on it takes is compiled.

        Returns:
          Scalars by name, with "loss" and the same names in every epoch.
        """
        raise NotImplementedError
