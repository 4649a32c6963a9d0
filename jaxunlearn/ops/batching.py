"""How a layer behaves under `vmap` over seeds, by platform: see `seedwise`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata


def on_cpu() -> bool:
    """Whether programs traced now are compiled for the CPU: decides between forms that are fast there and lax's own."""
    return jax.default_backend() == "cpu"


def outlined(function: Callable[..., Any], *arrays: Array) -> Any:
    """`function(*arrays)` as a call that XLA's CPU compiler does not inline, so that nothing outside fuses with it.

    Left alone, XLA recomputes a cheap producer inside each of its consumers. The residual stream of a ResNet is such a
    chain: every filter gradient computed all blocks before it again, 130 of 420 ms of a ResNet-20 step of batch 128.
    """
    if not on_cpu():
        return function(*arrays)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*arrays)


def seedwise(function: Callable[..., Any], *arrays: Array, together: Callable[..., Any] | None = None) -> Any:
    """`function(*arrays)`; under `vmap` over seeds in the form that is fast on the platform.

    On CPU that is one call of `function` for each seed: with per-seed weights `vmap` makes a convolution a grouped one,
    which the CPU runs five times slower. Unrolled layer by layer, the stack at the end of one layer and the index at
    the start of the next cancel in XLA, and the program is that of each seed alone.

    Elsewhere it is `together(*arrays)`, where every array has the seeds in front, or without it what `vmap` makes of
    `function`. A single seed is `function` as it stands.

    Its derivatives are those of `function`, and under `vmap` what `vmap` makes of them, slower than this: inside the
    rules of a `custom_vjp` only second derivatives take them.
    """
    if not on_cpu() and together is None:
        return function(*arrays)
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(axis_size: int, batched: Sequence[bool], *arrays: Array) -> tuple[Any, Any]:
        if together is not None and axis_size > 1 and not on_cpu():
            pairs = zip(arrays, batched, strict=True)
            stacked = together(*(a if b else jnp.broadcast_to(a, (axis_size, *a.shape)) for a, b in pairs))
        else:
            one = partial(seedwise, function, together=together)
            each = [one(*(a[i] if b else a for a, b in zip(arrays, batched, strict=True))) for i in range(axis_size)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        return stacked, jax.tree.map(lambda _: True, stacked)

    called = jax.custom_jvp(lambda *arrays: mapped(*arrays))
    called.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return called(*arrays)
