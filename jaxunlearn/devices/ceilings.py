"""What one device can do at most: the rates that a program's own are held against."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn.devices.configuration import computing

# A CPU is as fast with 2048, and done sooner; an accelerator is not: it takes 8192 to fill.
MATMUL, MATMUL_CPU = 8192, 2048
COPIED, COPIED_CPU = 1 << 30, 1 << 28  # bytes, beyond every cache
SECONDS, ROUNDS = 2.0, 20  # at most, of either, for one rate


def matmul_rate(precision: str) -> float:
    """The best FLOP/s of a product of two large square matrices, as a run in `precision` computes it."""
    size = MATMUL_CPU if jax.default_backend() == "cpu" else MATMUL
    a = jnp.ones((size, size), jnp.bfloat16 if precision == "bf16" else jnp.float32)
    with computing(precision):
        return 2 * size**3 / _fastest(jax.jit(lambda a: jnp.dot(a, a)), a)


def copy_rate() -> float:
    """The best bytes/s, read and written together, of adding 1 to a large float32 array."""
    size = COPIED_CPU if jax.default_backend() == "cpu" else COPIED
    return 2 * size / _fastest(jax.jit(lambda x: x + 1), jnp.zeros(size // 4, jnp.float32))


def _fastest(call: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Seconds of one `call(argument)`, after one that is not timed."""
    # On an accelerator ten are queued at once: a product takes only a millisecond there, so dispatch would count.
    calls = 1 if jax.default_backend() == "cpu" else 10
    jax.block_until_ready(call(argument))
    best, end = float("inf"), time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            result = call(argument)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / calls)
        if time.perf_counter() > end:
            break
    return best
