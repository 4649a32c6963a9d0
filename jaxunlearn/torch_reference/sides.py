"""What the package and the PyTorch harness each make of the same weights and the same batches."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from jaxunlearn.data.batches import Batch
from jaxunlearn.evaluation.metrics import unlearning_metrics
from jaxunlearn.methods.rule import Context, UnlearningRule
from jaxunlearn.models.network import Network, make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.registry import get_method
from jaxunlearn.torch_reference import harness, models
from jaxunlearn.torch_reference.cases import BATCH_SIZE, Case, epochs_of, without_dropout
from jaxunlearn.torch_style import baselines
from jaxunlearn.torch_style.models import Generator, Model
from jaxunlearn.training.unlearning import make_context

Arrays = Mapping[str, np.ndarray]  # by state_dict key
Factory = Callable[[Context], UnlearningRule]

CLASSES = Path(baselines.__file__).parent
# What weights are held in, and what PyTorch computes in: it is the package alone that computes in bfloat16.
DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "fp32": (np.float32, torch.float32),
    "bf16": (np.float32, torch.float32),
    "fp64": (np.float64, torch.float64),
}
BFLOAT16 = 2.0**-8  # u of it


class Trace(NamedTuple):
    """What one side did with one method."""

    loss: float  # of the first step
    gradients: Arrays  # of the first update
    state: Arrays  # parameters and BatchNorm statistics after the last step
    metrics: dict[str, float]


# The package.


class Recorded(NamedTuple):
    """The state of an optimizer that keeps the first gradient it is given."""

    updates: jax.Array
    first: Any
    inner: Any


def recording(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params: Any) -> Recorded:
        return Recorded(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), optimizer.init(params))

    def update(gradients: Any, state: Recorded, params: Any = None) -> tuple[Any, Recorded]:
        first = jax.tree.map(lambda old, new: jnp.where(state.updates == 0, new, old), state.first, gradients)
        updates, inner = optimizer.update(gradients, state.inner, params)
        return updates, Recorded(state.updates + 1, first, inner)

    return optax.GradientTransformation(init, update)


def package_network(case: Case, precision: str) -> tuple[Network, Callable[[Any], Any]]:
    """The network in a precision, and what casts weights to it. Call, and use, inside `jax.enable_x64` for fp64."""
    network = make_network(dataclasses.replace(case.protocol, precision=precision), case.num_classes)
    cast = partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, DTYPES[precision][0]))
    return without_dropout(network), cast


def package_sides(name: str) -> dict[str, Factory]:
    """A baseline in the package's two forms: the pure rule, and the class of the PyTorch harness."""
    methods = {"rule": get_method(name), "class": get_method(str(CLASSES / f"torch_{name}.py"))}
    return {side: method.factory for side, method in methods.items() if method.factory is not None}


def package_logits(case: Case, precision: str) -> dict[str, dict[str, np.ndarray]]:
    """Logits of the first retain batch in both modes, fp32 or bf16: as a rule asks for them, and as a class does."""
    network, cast = package_network(case, precision)
    variables = cast(case.variables["params"]), cast(case.variables["batch_stats"])
    images, key = case.batches[0][0].images, jax.random.key(0)

    @jax.jit
    def logits(params: Any, batch_stats: Any) -> dict[str, dict[str, jax.Array]]:
        def model() -> Model:
            return Model(network, params, batch_stats, Generator(key))

        trained, _ = network.apply_train(params, batch_stats, images, key)
        return {
            "rule": {"eval": network.apply_eval(params, batch_stats, images), "train": trained},
            "class": {"eval": model().eval()(images), "train": model().train()(images)},
        }

    with jax.default_matmul_precision("highest"):  # accelerators compute less than fp32 when not told
        return jax.device_get(logits(*variables))


def package_trace(case: Case, factory: Factory, precision: str) -> Trace:
    """The steps of a rule of the package; its metrics where they are those of a trajectory."""
    with jax.enable_x64(precision == "fp64"), jax.default_matmul_precision("highest"):
        network, cast = package_network(case, precision)
        context = make_context(network, case.protocol, case.num_classes, max(1, case.steps // 4))
        random_params = cast(case.random_params)
        rule = factory(
            context._replace(
                optimizer=recording(context.optimizer),
                initialise=lambda key: (random_params, network.initialise(key)[1]),
            )
        )
        params = cast(case.variables["params"])
        state = jax.jit(rule.init)(params, cast(case.variables["batch_stats"]), jax.random.key(0))
        assert rule.step is not None
        step, losses = jax.jit(rule.step), []
        for index, epoch in enumerate(epochs_of(case, precision)):
            state = state._replace(step=jnp.asarray(index, jnp.int32), epoch=jnp.asarray(epoch, jnp.int32))
            retain, forget = jax.tree.map(jnp.asarray, case.batches[index])
            params, state, metrics = step(params, state, retain, forget)
            losses.append(metrics["loss"])

        def is_record(node: Any) -> bool:
            return isinstance(node, Recorded)

        (recorded,) = filter(is_record, jax.tree.leaves(state.opt_state, is_leaf=is_record))
        evaluated = jax.jit(network.apply_eval)
        metrics = {}
        if precision == "fp64":
            logits = [evaluated(params, state.batch_stats, batch.images) for batch in (case.test, case.members)]
            metrics = package_metrics(case, *(np.asarray(values) for values in logits))
        return Trace(
            float(losses[0]),
            to_state_dict({"params": jax.device_get(recorded.first)}),
            to_state_dict(jax.device_get({"params": params, "batch_stats": state.batch_stats})),
            metrics,
        )


def package_metrics(case: Case, test: np.ndarray, members: np.ndarray) -> dict[str, float]:
    test_confidence, member_confidence = (np.asarray(jax.nn.softmax(logits)).max(1) for logits in (test, members))
    forget = case.test.labels == case.protocol.forget_class
    correct = test.argmax(1) == case.test.labels
    confidence = member_confidence, test_confidence[forget], member_confidence  # nothing is augmented here
    return unlearning_metrics(correct, case.test.labels, case.protocol.forget_class, *confidence)


# PyTorch.


def tensors(batch: Batch, dtype: torch.dtype) -> harness.Pair:
    images, labels = (torch.tensor(np.asarray(part)) for part in batch)
    return images.permute(0, 3, 1, 2).to(dtype), labels.long()


def pytorch_model(case: Case, params: Any, precision: str) -> torch.nn.Module:
    model = models.build(case.protocol, case.num_classes, dropout=0.0)
    state = to_state_dict({"params": params, "batch_stats": case.variables["batch_stats"]})
    model.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    if precision == "fp64":
        models.use_depthwise_products(model)
    return model.to(DTYPES[precision][1])


def perturb(model: torch.nn.Module, size: float, draw: int) -> None:
    """Moves each weight by about `size` times itself."""
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter * (1 + size * noise))


def rounding(case: Case, precision: str) -> float:
    """The relative error that rounding makes in the longest sum of a step, sqrt(n) u: n is the length of a product of
    weights and inputs, or the number of a batch's pixels, over which BatchNorm and the gradients of weights add.

    In bf16 sums are fp32, and u of bfloat16 is lost once, where weights and what layers hand on are rounded.
    """
    longest = max(math.prod(leaf.shape[:-1]) for leaf in jax.tree.leaves(case.variables["params"]))
    pixels = BATCH_SIZE * math.prod(case.test.images.shape[1:3])
    sums = math.sqrt(max(longest, pixels)) * np.finfo(DTYPES[precision][0]).eps / 2
    return float(sums) + (BFLOAT16 if precision == "bf16" else 0)


@torch.no_grad()
def pytorch_logits(case: Case, precision: str, draw: int | None = None) -> dict[str, np.ndarray]:
    """What `package_logits` is compared with; from weights perturbed as `precision` rounds where there is a `draw`."""
    model = pytorch_model(case, case.variables["params"], "fp32")
    if draw is not None:
        perturb(model, rounding(case, precision), draw)
    images, _ = tensors(case.batches[0][0], torch.float32)
    return {"eval": model.eval()(images).numpy(), "train": model.train()(images).numpy()}


def pytorch_trace(case: Case, name: str, precision: str, draw: int | None = None) -> Trace:
    """The steps of a baseline of the harness; from perturbed weights where there is a `draw`."""
    model = pytorch_model(case, case.variables["params"], precision).train()
    if draw is not None:
        perturb(model, rounding(case, precision), draw)
    options = {}
    if name == "bad_teacher":
        options["incompetent"] = harness.frozen(pytorch_model(case, case.random_params, precision))
    step, optimizer = harness.BASELINES[name](model, **options), harness.adam(model, case.protocol)
    gradients: dict[str, np.ndarray] = {}

    def record(*_: Any) -> None:
        if not gradients:
            gradients.update({key: p.grad.clone().numpy() for key, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(record)
    dtype, losses = DTYPES[precision][1], []
    for epoch, (retain, forget) in zip(epochs_of(case, precision), case.batches, strict=False):
        losses.append(step(optimizer, tensors(retain, dtype), tensors(forget, dtype), epoch))
    metrics = {}
    if precision == "fp64":
        test, (members, _) = (tensors(batch, dtype) for batch in (case.test, case.members))
        metrics = harness.evaluate(model, test, members, case.protocol.forget_class)
    state = {key: value.numpy() for key, value in model.state_dict().items() if "num_batches" not in key}
    return Trace(float(losses[0]), gradients, state, metrics)
