"""How far a device's results are from the CPU's: of a whole model, and of each of its convolutions with its gradients.

Not the gradient of a whole model: an activation near 0 that falls on the other side of it changes that by 1%, in
float32 on a CPU against float64 too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.models.layers import Conv
from jaxunlearn.models.network import make_network
from jaxunlearn.ops.convolution import conv2d

# Between what is float32 and what is less, which is 3e-4 a convolution: see `devices.configuration.computing`.
WITHIN = {"highest": 1e-5, "default": 2e-3}


class Layer(NamedTuple):
    """A convolution of one image."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int
    groups: int


def agreement(protocol: Protocol, classes: int, count: int, compile_in_turn: Callable[[], None]) -> dict[str, Any]:
    """Relative errors for each precision of `WITHIN`: of loss and logits of `count` images in train mode, and of the
    worst value or gradient of a layer; "ok": all are as they should be. `compile_in_turn` is called before the device
    is used.
    """
    network, cpu = make_network(protocol, classes), jax.devices("cpu")[0]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, 32, 32, 3)).astype(np.float32)
    labels = np.arange(count, dtype=np.int32) % classes

    def whole(params: Any, batch_stats: Any) -> tuple[jax.Array, jax.Array]:
        logits, _ = network.apply_train(params, batch_stats, images, jax.random.key(1))
        return cross_entropy(logits, jnp.asarray(labels)), logits

    def results(variables: Any, arrays: Any) -> dict[str, Any]:
        loss, logits = whole(*variables)
        each = [value_and_gradients(layer, *own) for layer, own in zip(layers, arrays, strict=True)]
        return {"loss": loss, "logits": logits, "layers": each}

    with jax.default_device(cpu):
        variables = jax.device_get(jax.jit(network.initialise)(jax.random.key(0)))
        layers = convolutions(lambda: whole(*variables))
        arrays = [inputs(layer, count, rng) for layer in layers]
        expected = jax.device_get(jax.jit(results).lower(variables, arrays).compile()(variables, arrays))
    compile_in_turn()
    errors: dict[str, dict[str, float]] = {}
    for precision in WITHIN:
        with jax.default_matmul_precision(precision):
            program = jax.jit(lambda *given: results(*given)).lower(variables, arrays).compile()
            found = jax.device_get(program(variables, arrays))
        errors[precision] = {name: far(found[name], expected[name]) for name in ("loss", "logits")}
        each = map(far, *map(jax.tree.leaves, (found["layers"], expected["layers"])))
        errors[precision]["worst_layer"] = max(each)
    return errors | {"ok": all(max(errors[precision].values()) < most for precision, most in WITHIN.items())}


def convolutions(trace: Callable[[], Any]) -> list[Layer]:
    """Those that differ of the networks applied in `trace`, in their order."""
    found: dict[Layer, None] = {}

    def see(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Conv) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["kernel"]
            found[Layer(args[0].shape[1:], kernel.shape, context.module.stride, context.module.groups)] = None
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        jax.eval_shape(trace)
    return list(found)


def inputs(layer: Layer, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Normal x, kernel and cotangent of `count` images."""
    (height, width, _), stride, features = layer.image, layer.stride, layer.kernel[-1]
    out = (count, -(-height // stride), -(-width // stride), features)
    return tuple(rng.normal(size=size).astype(np.float32) for size in ((count, *layer.image), layer.kernel, out))


def value_and_gradients(layer: Layer, x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    """y and the gradients of x and kernel."""
    y, pull = jax.vjp(lambda x, kernel: conv2d(x, kernel, layer.stride, layer.groups), x, kernel)
    return y, *pull(g)


def far(a: Any, b: Any) -> float:
    """The distance of a from b, relative to b's norm."""
    b = np.asarray(b, np.float64)
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
