"""PyTorch's class interface in JAX: methods written for the PyTorch harness, compiled and for many seeds at once.

A method is a class with an `unlearn_step` (see `UnlearningMethod`); a model is `model(images)`. A file with such a
class is a rule file: `bench.py --method FILE.py`. What is not as in PyTorch is so because the step is traced:

- `optimizer.step(closure)` takes the gradient itself: no `zero_grad`, no `backward`.
- Values are known only when the compiled step runs: `jnp.where` in place of `if`, metrics without `.item()`. Only
  `epoch` is an int.
- What is on `self` after `setup` is all there is: teachers are made there, and what depends on the data is filled in
  `prepare`.
- Arrays never change: parameters and gradients are read by name, and replaced.
"""

from jaxunlearn.torch_style.interface import Optimizer, UnlearningMethod
from jaxunlearn.torch_style.models import Model, mobilenet_v2, resnet20, vgg16_bn
from jaxunlearn.torch_style.rules import as_rule

__all__ = ["Model", "Optimizer", "UnlearningMethod", "as_rule", "mobilenet_v2", "resnet20", "vgg16_bn"]
