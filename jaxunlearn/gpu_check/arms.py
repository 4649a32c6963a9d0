"""The arms of a check: which there are, and how they are written down."""

import re
import shlex
from typing import NamedTuple

from jaxunlearn.errors import UserError

MODELS = {
    "resnet": "resnet20-cifar10-class0",
    "vgg": "vgg16bn-cifar100-class0",
    "mobilenet": "mobilenetv2-fmnist-class0",
}
PRECISIONS = ("fp32", "tf32", "bf16")
WIDTHS = r"[1-9]\d*-[1-9]\d*|vmap"  # one of `ops.blocks.WIDTHS`, or what `vmap` makes of it
FORMS = {"eager": "eager", "compiled": "compiled", "graphs": "CUDA graphs"}  # of PyTorch

# LIMIT [NAME=VALUE ...] WORDS [# WHAT IT DECIDES], the most telling first. The words:
#   ceilings                             products of matrices at each precision, and a copy
#   agree MODEL                          loss, logits and each convolution with its gradients against the CPU's
#   train MODEL PRECISION SEEDS WIDTHS   images/s of pretraining, and the kernels of a step
#   torch MODEL PRECISION FORM ...       PyTorch's
#   digits                               the digits benchmark three times
DEFAULT = """
40 ceilings # what the rates below are held against
150 digits # whole runs; the same bits from compiled and from kept programs; what deterministic operations cost
100 train resnet tf32 8 128-128 # the widths of groups
100 train resnet tf32 8 16-64 # the widths of groups
100 train resnet bf16 8 512-512 # the widths of groups in bf16: one for all seeds
100 train resnet bf16 8 128-128 # the widths of groups in bf16
120 train mobilenet tf32 1 16-64 # what to be faster with
120 torch mobilenet tf32 graphs # what to be faster than
120 train mobilenet tf32 8 16-64 # groups beside depthwise layers
100 train vgg bf16 1 128-128 # whether bf16 is faster
100 torch vgg bf16 graphs # what to be faster than
120 train mobilenet bf16 1 128-128 # whether bf16 is faster
120 torch mobilenet bf16 graphs # what to be faster than
100 train resnet tf32 1 16-64 # one seed: what eight are held against
100 train resnet bf16 1 128-128 # one seed: what eight are held against
60 agree resnet # fp32 and tf32 mean what they say
60 agree vgg # fp32 and tf32 mean what they say
90 agree mobilenet # fp32 and tf32 mean what they say
100 train resnet fp32 1 16-64 # what full float32 costs
100 torch resnet tf32 eager graphs # what to be faster than
100 torch resnet bf16 graphs # what to be faster than
100 train resnet tf32 32 16-64 # whether more seeds go on paying
100 XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONVOLUTION train resnet tf32 1 16-64 # all in command buffers
100 train resnet tf32 8 vmap # whether groups are still worth having
"""
# One of each kind: for a CPU, to see that all of it works.
TINY = """
300 ceilings # nothing
300 agree resnet # nothing
300 XLA_FLAGS=--xla_force_host_platform_device_count=1 train resnet bf16 1 vmap # nothing
300 torch resnet fp32 eager # nothing
300 digits # nothing
"""


class Arm(NamedTuple):
    """One measurement."""

    words: tuple[str, ...]
    limit: float  # seconds, from where its turn to compile and measure comes
    environment: dict[str, str]
    decides: str

    @property
    def name(self) -> str:
        return " ".join((*(f"{name}={value}" for name, value in self.environment.items()), *self.words))


def parse(text: str) -> list[Arm]:
    """The arms of a list as above, a line each; empty lines and comments are none. Raises UserError."""
    arms = []
    for line in text.splitlines():
        before, _, decides = line.partition("#")
        try:
            words = shlex.split(before)
            if words:
                limit, environment = float(words.pop(0)), {}
                while words and "=" in words[0]:
                    name, _, environment[name] = words.pop(0).partition("=")
                if not (0 < limit < float("inf") and _known(words)):
                    raise ValueError
                arms.append(Arm(tuple(words), limit, environment, decides.strip()))
        except ValueError:
            remedy = "write LIMIT [NAME=VALUE ...] WORDS [# WHAT IT DECIDES], such as 60 train resnet tf32 8 16-64"
            raise UserError(f"no arm: {line.strip()}: {remedy}") from None
    if not arms:
        raise UserError("there is no arm in the list")
    return arms


def _known(words: list[str]) -> bool:
    match words:
        case ["ceilings" | "digits"]:
            return True
        case ["agree", model]:
            return model in MODELS
        case ["train", model, precision, seeds, width]:
            return (
                model in MODELS
                and precision in PRECISIONS
                and seeds.isdecimal()
                and seeds != "0"
                and re.fullmatch(WIDTHS, width) is not None
            )
        case ["torch", model, precision, form, *forms]:
            return model in MODELS and precision in PRECISIONS and {form, *forms} <= FORMS.keys()
    return False
