"""What to write in place of what a class of the PyTorch harness has written and JAX has not."""

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import UserError, one_line
from jaxunlearn.torch_style.epochs import ESCAPED
from jaxunlearn.torch_style.interface import Optimizer
from jaxunlearn.torch_style.models import Model

PREPARE = "prepare(self, model, retain_set, forget_set, optimizer)"
PARTS = {
    "setup": "setup(self, model)",
    "prepare": PREPARE,
    "unlearn_step": "unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch)",
}
TORCH = (
    "torch's functions take no JAX arrays: jax.numpy and jax.nn have the like, "
    "jaxunlearn.methods.rule has cross_entropy, kl_divergence and accuracy"
)

LEARNS = "optimizer.step(closure) takes the gradient of the loss that the closure returns: leave it out"
FIXED = "the optimizer is the protocol's and cannot be changed"
BY_NAME = "loss, gradients = optimizer.gradients(closure) gives them by name, optimizer.update(gradients) learns"
OF_IMAGES = "that of images is jax.grad's, the model in eval mode"
NO_GRADIENT = f"only the model that learns has a gradient: leave it out; to freeze parameters, {BY_NAME}; {OF_IMAGES}"
MODEL = (
    "a model is one function: dict(model.named_parameters())['conv1.weight'] is a parameter, "
    "model.load_state_dict({name: array}) replaces it, model.train(batch_norm=False) is BatchNorm alone in eval mode, "
    "logits, features = model.with_features(images) is what the last layer is given"
)
VALUES = (jax.Array, np.ndarray, np.generic, float, tuple, type(None))  # what PyTorch would have tensors for
NEVER_CHANGES = "an array never changes and has one device: leave it out"
INSTEAD = {  # what PyTorch has and JAX has not
    "backward": LEARNS,
    "zero_grad": LEARNS,
    "param_groups": FIXED,
    "requires_grad_": NO_GRADIENT,
    "requires_grad": NO_GRADIENT,
    "grad": f"{BY_NAME}; {OF_IMAGES}",
    "detach": "write jax.lax.stop_gradient",
    "permute": "write transpose",
    "unsqueeze": "write jnp.expand_dims",
    "dim": "write ndim",
    "numel": "write size",
    "norm": "write jnp.linalg.norm",
    "masked_fill": "write jnp.where",
    "topk": "write jax.lax.top_k",
    "float": "write astype(jnp.float32)",
    "long": "write astype(jnp.int32)",
    "clone": NEVER_CHANGES,
    "contiguous": NEVER_CHANGES,
    "data": "an array never changes: leave it out, and replace parameters by model.load_state_dict({name: array})",
    "cpu": NEVER_CHANGES,
    "cuda": NEVER_CHANGES,
    "to": NEVER_CHANGES,
    "numpy": "write jnp in place of np",
}
ARGUMENTS = {"dim": "axis", "keepdim": "keepdims"}
UNEXPECTED = re.compile(f"unexpected keyword argument '({'|'.join(ARGUMENTS)})'")  # Python 3.13 goes on: "Did you mean"


def check_parts(method: Any) -> None:
    """Raises UserError, which says what to write, where a method of the class cannot be called as it will be."""
    for part, written in PARTS.items():
        function = getattr(method, part, None)
        if function is None:
            continue
        try:
            inspect.signature(function).bind(*written.split(", ")[1:])
        except TypeError:
            data = f"; what looks at the data is {PREPARE}" if part == "setup" else ""
            raise UserError(f"{type(method).__name__}.{part}: write {written}{data}") from None


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
        unknown = part != "setup" and isinstance(error, AttributeError) and isinstance(error.obj, cls)
        first = ": give it its first value in setup(self, model)" if unknown else ""
        raise UserError(f"{place}: {advice(error)}{first}") from error


def advice(error: Exception) -> str:
    """What to write instead of what has failed, where that is known; else what has failed."""
    unknown = "which is not known while the step is traced"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, jax.errors.TracerBoolConversionError):
        asks = f"`if`, `while`, `and` and `or` ask for the value of an array, {unknown}"
        return f"{asks}: write jnp.where or jax.lax.cond; what is done once, in setup or prepare"
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return f"NumPy asks for the values of an array, {unknown}: write jnp in place of np"
    if isinstance(error, jax.errors.TracerIntegerConversionError):
        return f"an index of a list and a range ask for the value of an array, {unknown}: index a jnp array"
    if isinstance(error, jax.errors.ConcretizationTypeError):
        what = ".item(), float() and int() ask for the value of an array"
        return f"{what}, {unknown}: keep the array, and return a metric as it is"
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return ESCAPED
    if _is_of_torch(error):
        return TORCH
    if isinstance(error, AttributeError):
        name = error.name or str(error).rpartition("attribute '")[2].rstrip("'")  # unnamed where one is set
        if instead := _instead(name, error.obj):
            return f".{name} is PyTorch's: {instead}"
    if isinstance(error, NotImplementedError) and "array.view()" in str(error):
        return ".view is PyTorch's: write reshape"
    if isinstance(error, TypeError) and (unexpected := UNEXPECTED.search(str(error))):
        return f"{unexpected[1]}= is PyTorch's: write {ARGUMENTS[unexpected[1]]}="
    if isinstance(error, TypeError) and str(error) == "'int' object is not callable":
        return f"{one_line(error)} (PyTorch's images.size(0) is images.shape[0])"
    return one_line(error)


def _is_of_torch(error: Exception) -> bool:
    """Whether torch was asked for, or something of it met an array."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").startswith("torch")
    places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(place.startswith("torch.") for place in places):
        return True
    return "Tensor" in str(error) if isinstance(error, TypeError) else getattr(error, "name", "") == "__dlpack_device__"


def _instead(name: str, owner: Any) -> str | None:
    """What to write for an attribute that `owner` has not, where it is one of ours or of JAX."""
    if isinstance(owner, jax.Array) and name not in INSTEAD:
        if name.endswith("_") and not name.startswith("_"):
            return "an array never changes: x.mul_(2) is x = x * 2, x[i] = 0 is x = x.at[i].set(0)"
        homes = (("jnp", jnp), ("jax.nn", jax.nn), ("jax.lax", jax.lax))
        known = [f"write {home}.{name}(array)" for home, module in homes if hasattr(module, name)]
        return known[0] if known else "an array has it not, see jax.numpy and jax.nn"
    if isinstance(owner, Model | Optimizer):
        return INSTEAD.get(name, MODEL if isinstance(owner, Model) else FIXED)
    return INSTEAD.get(name) if isinstance(owner, VALUES) else None
