"""What a class cannot do is refused in one line, which says what to write."""

import pytest
from test_torch_style import context, start

from jaxunlearn.errors import UserError
from jaxunlearn.registry import get_method
from jaxunlearn.training.checking import check_rule

pytestmark = pytest.mark.usefixtures("tiny_models")

CLASS = """
import copy
import jax
import jax.numpy as jnp
import numpy as np

class Mine:
    def __init__(self):
        self.count = 0
        self.average = jnp.zeros(())
        self.history = []

    def setup(self, model):
        {setup}

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch
        {step}
        return {{"loss": step}}
"""
KNOWN = "which is not known while the step is traced"


def check_class(tmp_path, step="pass", setup="pass"):
    """Checks a class with these lines, as `bench.py --method mine.py` does."""
    check_text(tmp_path, CLASS.format(step=step, setup=setup))


def check_text(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    method = get_method(str(tmp_path / "mine.py"))
    check_rule(method, method.factory(context()), context(), [(4, 4)])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("return {'loss': images.sum().item()}", rf"line 18: .item.*{KNOWN}: .* return a metric as it is"),
        ("return {'loss': float(images.sum())}", rf"line 18: .item.*{KNOWN}: .* return a metric as it is"),
        ("scale = [1, 2][step]", rf"line 18: an index .*{KNOWN}: .* jnp array"),
        ("for _ in range(step): pass", rf"line 18: an index .*{KNOWN}"),
        ("scale = 1 if images.sum() > 0 else 2", rf"line 18: `if`.*{KNOWN}: write jnp.where or jax.lax.cond"),
        ("while step < 3: pass", rf"line 18: `if`.*{KNOWN}: write jnp.where"),
        ("scale = np.asarray(images).sum()", rf"line 18: NumPy .*{KNOWN}: write jnp in place of np"),
        ("model(images).sum().backward()", r"line 18: .backward is PyTorch's: optimizer.step\(closure\) takes"),
        ("optimizer.zero_grad()", r"line 18: .zero_grad is PyTorch's: optimizer.step\(closure\) takes"),
        ("optimizer.param_groups[0]['lr'] = 1", "line 18: .param_groups is PyTorch's: the optimizer is the protocol's"),
        ("model(images).detach()", "line 18: .detach is PyTorch's: write jax.lax.stop_gradient"),
        ("model.requires_grad_(False)", "line 18: .requires_grad_ is PyTorch's: .* leave it out"),
        ("model(images.transpose(0, 3, 1, 2))", r"line 18: a model takes images \[B, 32, 32, 3\], not \[4, 3,"),
        ("model.layer3", r"line 18: .layer3 is PyTorch's: a model is one function: dict\(model.named_parameters\(\)\)"),
        ("list(model.modules())", r"line 18: .modules is PyTorch's: a model is one function"),
        ("model.fc = images", r"line 18: .fc is PyTorch's: a model is one function"),
        ("model.cuda()", "line 18: .cuda is PyTorch's: an array never changes and has one device: leave it out"),
        ("optimizer.lr", "line 18: .lr is PyTorch's: the optimizer is the protocol's"),
        ("images.grad", r"line 18: .grad is PyTorch's: loss, gradients = optimizer.gradients\(closure\) .*jax.grad's"),
        ("images.requires_grad_()", r"line 18: .requires_grad_ is .*freeze parameters, loss, gradients = .*jax.grad's"),
        ("for p in model.parameters(): p.requires_grad = False", "line 18: .requires_grad is PyTorch's: .*freeze"),
        ("images.permute(0, 3, 1, 2)", "line 18: .permute is PyTorch's: write transpose"),
        ("images.view(4, -1)", "line 18: .view is PyTorch's: write reshape"),
        ("images.size(0)", r"line 18: TypeError: 'int' object .*PyTorch's images.size\(0\) is images.shape\[0\]"),
        ("images.log_softmax(-1)", r"line 18: .log_softmax is PyTorch's: write jax.nn.log_softmax\(array\)"),
        ("jax.nn.log_softmax(images, dim=-1)", "line 18: dim= is PyTorch's: write axis=$"),
        ("images.mean(0, keepdim=True)", "line 18: keepdim= is PyTorch's: write keepdims=$"),
        ("loss = model(images).mean(); optimizer.step(lambda: loss)", "line 18: the closure's loss does not depend on"),
        ("optimizer.step(lambda: jnp.zeros(()))", "line 18: the closure's loss does not depend on the model"),
        ("images.exp()", r"line 18: .exp is PyTorch's: write jnp.exp\(array\)"),
        ("images.mul_(2)", r"line 18: .mul_ is PyTorch's: an array never changes: x.mul_\(2\) is x = x \* 2"),
        ("images.pin_memory()", "line 18: .pin_memory is PyTorch's: an array has it not, see jax.numpy and jax.nn"),
        ("jax.absent", "line 18: AttributeError: module 'jax' has no attribute 'absent'"),
        ("self.data", "line 18: AttributeError: 'Mine' .* 'data': give it its first value in setup"),
        ("raise TypeError('argument must be Tensor, not Tracer')", "line 18: torch's functions take no JAX arrays"),
        ("import torch_absent", "line 18: torch's functions take no JAX arrays"),
        ("jax.grad(lambda x: model(x).sum())(images)", "inside jax.grad a model is in eval mode"),
        ("optimizer.update({})", r"line 18: optimizer.update\(gradients\) takes one gradient for each .*'bn.bias'"),
        ("if step == 0: self.teacher = copy.deepcopy(model)", "line 18: `if`.*what is done once, in setup or prepare"),
        ("loss = images.mean() * np.random.normal()", r"step draws with numpy.random, .* model.random_key\(\)"),
        ("raise ValueError('first\\nsecond')", "line 18: ValueError: first second"),
        ("optimizer.step(lambda: None)", "the closure returns NoneType: it must return the loss"),
        ("optimizer.step(lambda: model(images))", "scalar-output functions"),
        ("kept = []; optimizer.step(lambda: kept.append(model(images)) or kept[0].sum()); step = kept[0].sum()",
         "a value made inside a closure .* is used outside it: return it"),
        ("self.teacher = copy.deepcopy(model)", r"self.teacher holds an array that .*: create it in setup\(self, mo"),
        ("self.teacher = [copy.deepcopy(model)]", r"such as self.teacher = copy.deepcopy\(model\).eval\(\)$"),
        ("self.mean = images.mean(0)", r"such as self.mean = jnp.zeros\(\(32, 32, 3\), 'float32'\)$"),
        ("self.mask = model.state_dict()", "such as self.mask = {name: jnp.zeros_like"),
        ("self.history.append(step)", r"self.history holds an array that .*: create it in setup\(self, model\)"),
        ("self.count = self.count + step", r"self.count holds an array that .*: create it in setup\(self, model\)"),
        ("self.count += 1", r"self.count changes in a step, which is traced only once: only arrays that setup"),
        ("self.last = epoch", r"self.last changes in a step, which is traced only once"),
        ("self.average = 1.0", r"self.average changes in a step, which is traced only once"),
        ("del self.average", r"self.average changes in a step, which is traced only once"),
        ("self.average = images.mean(0)", r"self.average changes in a step from float32\[\] to float32\[32, 32, 3\]"),
        ("return step", "it returns .*Tracer: it must return a dict with at least 'loss'"),
        ("return {'loss': 'high'}", "Mine.unlearn_step: TypeError"),
        ("return {'accuracy': step}", "metrics must be a dict with at least 'loss'"),
        ("return {'loss': images}", "metric 'loss' is not a scalar"),
        ("if epoch < 2: return {'loss': step, 'away': step}", r"epochs 0 and 2 differ in what they return: .*'away'"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_refused_in_one_line(tmp_path, step, message):
    with pytest.raises(UserError, match=f"^method 'mine'.*{message}") as caught:
        check_class(tmp_path, step)
    assert "\n" not in str(caught.value)


def test_a_setup_may_draw_with_numpy(tmp_path):
    check_class(tmp_path, setup="self.noise = jnp.asarray(np.random.default_rng(0).normal(size=3))")


def test_a_model_that_is_not_on_self_is_in_eval_mode(tmp_path):
    before = "from jaxunlearn.torch_style import resnet20\n\nTEACHER = resnet20(){}\n"
    text = CLASS.format(step="TEACHER(images)", setup="pass")
    with pytest.raises(UserError, match=r"a model is in eval mode, and one that is not on `self` is always$"):
        check_text(tmp_path, before.format("") + text)
    check_text(tmp_path, before.format(".eval()") + text)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("self.teacher = model", r"self.teacher is the model that learns: write copy.deepcopy\(model\)"),
        ("self.models = {'teacher': [model.eval()]}", "self.models is the model that learns"),
        ("model.reset_parameters()", "Mine.setup changes the model that learns: only a step can do that, or prepare"),
        ("assert model.params['linear']['bias'][0] == 0", "Mine.setup, line 14: `if`"),
        ("self.count = 1 / 0", "Mine.setup, line 14: ZeroDivisionError"),
    ],
)
def test_a_setup_that_cannot_be_is_refused_in_one_line(tmp_path, setup, message):
    with pytest.raises(UserError, match=f"^method 'mine': {message}"):
        check_class(tmp_path, setup=setup)


HELPER = """
class Helper:
    def __init__(self, value):
        self.value = value

    def advance(self):
        self.value = self.value * 2
"""
ONLY_ARRAYS = "changes in a step, which is traced only once: only arrays that setup"


@pytest.mark.parametrize(
    ("setup", "step", "message"),
    [
        ("self.w = np.ones(1)", "self.w *= 0.9", f"self.w {ONLY_ARRAYS}"),
        ("self.seen = set()", "self.seen.add(epoch)", f"self.seen {ONLY_ARRAYS}"),
        ("self.kept = [Helper(1)]", "self.kept[0].advance()", f"self.kept {ONLY_ARRAYS}"),
        ("self.ema = Helper(jnp.zeros(2))", "pass", "self.ema: arrays in a Helper are not carried on: keep"),
        ("self.teacher = copy.deepcopy(model)", "self.teacher.eval()",
         r"self.teacher changes its mode in a step: call .eval\(\) or .train\(\) in setup"),
        ("self.one = copy.deepcopy(model); self.both = [self.one]", "pass",
         "self.both holds what is self.one too, and each would change by itself: keep it once"),
        ("self.twice = [{'a': jnp.zeros(2)}] * 2", "pass", "self.twice holds what is in it twice"),
    ],
)  # fmt: skip
def test_what_would_not_be_carried_on_is_refused(tmp_path, setup, step, message):
    with pytest.raises(UserError, match=f"^method 'mine': .*{message}"):
        check_text(tmp_path, HELPER + CLASS.format(step=step, setup=setup))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_network_of_ones_own_is_made_in_setup(tmp_path, mode):
    setup = f"from jaxunlearn.torch_style import resnet20; self.fresh = resnet20(seed=1).{mode}()"
    check_class(tmp_path, setup=setup, step="target = self.fresh(images); optimizer.step(lambda: model(images).mean())")


def test_what_stays_as_it_is_may_be_anything(tmp_path):
    setup = "self.kept = [Helper({'a': [1, np.arange(3)]}), {1, 2}, print, np, np.nan]; self.kept[0].me = self.kept[0]"
    check_text(tmp_path, HELPER + CLASS.format(step="optimizer.step(lambda: model(images).mean())", setup=setup))


@pytest.mark.parametrize(
    ("line", "written", "message"),
    [
        ("def setup(self, model)", "def setup(self, model, retain_loader, forget_loader)",
         r"Mine.setup: write setup\(self, model\); what looks at the data is prepare\(self, model, retain_set"),
        ("def setup(self, model)", "def prepare(self, model, data)",
         r"Mine.prepare: write prepare\(self, model, retain_set, forget_set, optimizer\)$"),
        ("optimizer, step, epoch)", "optimizer)", r"Mine.unlearn_step: write unlearn_step\(self, model, retain_batch"),
    ],
)  # fmt: skip
def test_a_part_with_other_arguments_is_refused(tmp_path, line, written, message):
    text = CLASS.format(step="pass", setup="pass")
    assert line in text
    with pytest.raises(UserError, match=f"^method 'mine': {message}"):
        check_text(tmp_path, text.replace(line, written))


def test_what_prepare_does_wrong_is_refused_in_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        CLASS.format(step="pass", setup="pass")
        + "\n    def prepare(self, model, retain_set, forget_set, optimizer):\n        self.count = len(retain_set)\n"
    )
    rule, params, state = start(get_method(str(tmp_path / "mine.py")).factory)
    with pytest.raises(UserError, match=r"^Mine.prepare: self.count changes .*: only arrays that setup\(self, model\)"):
        rule.prepare(params, state, [1, 2], [])
