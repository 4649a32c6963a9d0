"""How much memory the kernels of a training step are given and give back: each operand and each result, once a kernel.

    python results/speed/traffic.py

Forward and backward of a batch of 128 on a CPU, in GB: of ours with the compiled kernels, of ours in XLA's forms, and
of eager PyTorch, where that is installed, at fp32 and at bf16. It is a count and not a measurement: how much of it the
caches keep from memory is not in it, nor what a kernel reads twice.
"""

import functools
import importlib.util
import itertools
import math
import re
import unittest.mock

import jax
import jax.numpy as jnp

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.models import build
from jaxunlearn.ops import native

BENCHES = {"resnet20-cifar10-class0": 10, "vgg16bn-cifar100-class0": 100, "mobilenetv2-fmnist-class0": 10}
BATCH = 128
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call"}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


def program_bytes(text: str) -> int:
    """Of the instructions of a compiled program's text, without those inside a fusion or a reduction."""
    called = set(re.findall(r"\bcall\(.*?to_apply=%?([\w.\-]+)", text))
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text)) - called
    total, sizes, computation = 0, {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = head[1]
        elif found := INSTRUCTION.match(line):
            name, shape, op, rest = found.groups()
            arrays = [(kind, map(int, filter(None, dims.split(",")))) for kind, dims in ARRAY.findall(shape)]
            sizes[computation, name] = sum(BYTES[kind] * math.prod(dims) for kind, dims in arrays)
            if computation not in inside and op not in NO_KERNELS:
                operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
                total += sizes[computation, name] + sum(sizes[computation, operand] for operand in operands)
    return total


def ours(bench: str, classes: int, precision: str) -> int:
    """A step's, of the model that the bench trains."""
    network = build(get_benchmark(bench).model, classes, dtype=DTYPES[precision])
    images, labels = jnp.zeros((BATCH, 32, 32, 3)), jnp.zeros(BATCH, jnp.int32)
    variables = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)

    def loss(params, batch_stats):
        both = {"params": params, "batch_stats": batch_stats}
        key = {"dropout": jax.random.key(1)}
        logits, after = network.apply(both, images, train=True, mutable=["batch_stats"], rngs=key)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), after

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return program_bytes(step.lower(variables["params"], variables["batch_stats"]).compile().as_text())


def theirs(bench: str, classes: int, precision: str) -> int:
    """A step's in eager PyTorch, of the same model; views are no kernels."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from jaxunlearn.torch_reference.models import build as torch_model

    class Counted(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            leaves = jax.tree.leaves((arguments, keywords, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if not function.is_view:
                self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return result

    model = torch_model(get_benchmark(bench), classes).to(memory_format=torch.channels_last)
    images = torch.zeros(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    with Counted() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.long))
        loss.backward()
    return counted.total


if __name__ == "__main__":
    for precision, (bench, classes) in itertools.product(DTYPES, BENCHES.items()):
        counts = [ours(bench, classes, precision)]
        jax.clear_caches()
        with unittest.mock.patch.object(native, "library", lambda: None):
            counts.append(ours(bench, classes, precision))
        jax.clear_caches()
        counts += [theirs(bench, classes, precision)] if importlib.util.find_spec("torch") else []
        print(precision, bench, *(f"{count / 1e9:.2f}" for count in counts), flush=True)
