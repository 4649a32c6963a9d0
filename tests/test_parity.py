"""The comparison with PyTorch: it passes, every kind of error trips it, and what its command line says."""

import dataclasses
import functools
import io
import json
import sys

import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.typing import DTypeLike
from tiny import PROTOCOL

from jaxunlearn.commands.main import main
from jaxunlearn.data.datasets import load
from jaxunlearn.models import MODELS
from jaxunlearn.models.layers import BatchNorm, Conv, Linear
from jaxunlearn.registry import BASELINES

torch = pytest.importorskip("torch")

from jaxunlearn.torch_reference import cases, harness, models, parity  # noqa: E402

pytestmark = pytest.mark.usefixtures("tiny_models")
BENCH, STEPS = "resnet20-digits-class0", 4


class Small(nn.Module):
    """Two layers; the verdicts are about sums in layers that follow one another, which the tiny model has not."""

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        for layer, features in enumerate((8, 16), start=1):
            x = Conv(features, stride=2, dtype=self.dtype, name=f"conv{layer}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{layer}")(x, train))
        return Linear(self.num_classes, self.dtype, name="linear")(x.mean((1, 2)))


class SmallInPyTorch(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = models.conv(3, 8, stride=2), torch.nn.BatchNorm2d(8)
        self.conv2, self.bn2 = models.conv(8, 16, stride=2), torch.nn.BatchNorm2d(16)
        self.linear = torch.nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    build = models.build

    def built(protocol, num_classes, **options):
        return SmallInPyTorch(num_classes) if protocol.model == "small" else build(protocol, num_classes, **options)

    monkeypatch.setattr(models, "build", built)
    monkeypatch.setitem(MODELS, "small", Small)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    digits = load("digits", None, tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", Small)
        return cases.make_case(dataclasses.replace(PROTOCOL, model="small"), 10, digits, STEPS)


@pytest.fixture(scope="module", autouse=True)
def package_only_once():
    """The package's side of a method is computed once: the errors below are PyTorch's."""
    trace, results = parity.package_trace, {}

    def once(case, factory, precision):
        if (factory, precision) not in results:
            results[factory, precision] = trace(case, factory, precision)
        return results[factory, precision]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "package_sides", functools.cache(parity.package_sides))
        patch.setattr(parity, "package_trace", once)
        yield


def by_quantity(rows):
    return {(row.quantity, row.precision): row for row in rows}


def out(case, name="scrub"):
    """The rows that are out, each for both of the package's forms or for none."""
    rows = parity.compare(case, name)
    for row in rows:
        assert len({difference <= row.tolerance for difference, _ in row.found.values()}) == 1, row
    return {key for key, row in by_quantity(rows).items() if row.verdict == "OUT"}


@pytest.mark.parametrize("name", BASELINES)
def test_the_package_is_pytorchs_equal(case, name):
    rows = by_quantity([*parity.compare_models(case), *parity.compare(case, name)])
    assert all(row.found.keys() == {"rule", "class"} for row in rows.values())
    # A batch of four in bfloat16 has its kinks of ReLU elsewhere, which says little of its gradients.
    verdicts = {key: row.verdict for key, row in rows.items() if key != ("gradients", "bf16")}
    assert set(verdicts.values()) == {"ok"} and rows["gradients", "bf16"].verdict != "OUT", rows
    numbers = {"loss", "retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score"}
    assert {row.quantity for row in rows.values() if row.values.keys() == {"PyTorch", "rule", "class"}} == numbers
    assert {quantity for quantity, _ in rows} == numbers | {
        "logits in eval mode",
        "logits in train mode",
        "gradients",
        "parameters after 1 step",
        "BatchNorm after 1 step",
        f"parameters after {STEPS} steps",
        f"BatchNorm after {STEPS} steps",
    }
    # Where rounding is all there is, tolerances leave room for nothing else.
    most = {"fp64": 1e-9, "fp32": 1e-2, "bf16": 0.2}
    assert all(rows[key].tolerance < most[key[1]] for key in verdicts), rows


def test_a_wrong_rule_and_a_wrong_class_are_seen(case, monkeypatch):
    right, other = parity.package_sides("negative_gradient"), parity.package_sides("retain_finetune")
    for side in ("rule", "class"):
        monkeypatch.setattr(parity, "package_sides", lambda name, side=side: right | {side: other[side]})
        wrong = by_quantity(parity.compare(case, "negative_gradient"))["gradients", "fp64"]
        assert wrong.verdict == "OUT"
        assert [name for name, (difference, _) in wrong.found.items() if difference > wrong.tolerance] == [side]


def test_a_wrong_momentum_of_batch_norm_is_seen(case, monkeypatch):
    class Wrong(torch.nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels, momentum=0.11)

    monkeypatch.setattr(torch.nn, "BatchNorm2d", Wrong)
    found = out(case)
    assert {("BatchNorm after 1 step", "fp32"), (f"BatchNorm after {STEPS} steps", "fp64")} <= found
    assert not {("gradients", "fp32"), ("gradients", "fp64")} & found


def test_a_biased_running_variance_is_seen(case, monkeypatch):
    class Biased(torch.nn.BatchNorm2d):
        def forward(self, x):
            before = self.running_var.clone()
            y = super().forward(x)
            if self.training:
                count = x.numel() // x.shape[1]
                self.running_var = self.running_var - (self.running_var - 0.9 * before) / count
            return y

    monkeypatch.setattr(torch.nn, "BatchNorm2d", Biased)
    found = out(case)
    assert (f"BatchNorm after {STEPS} steps", "fp64") in found
    assert ("gradients", "fp64") not in found


def test_a_missing_square_of_the_temperature_is_seen(case, monkeypatch):
    kl_divergence = harness.kl_divergence
    monkeypatch.setattr(harness, "kl_divergence", lambda targets, logits: kl_divergence(targets, logits) / 16)
    # In fp32 the loss hides it: with alpha = .01 it is 3e-6 of the loss, less than rounding may be.
    assert {("loss", "fp64"), ("gradients", "fp64"), (f"parameters after {STEPS} steps", "fp64")} <= out(case)


def test_adams_epsilon_under_the_root_is_seen(case, monkeypatch):
    class Inside(torch.optim.Adam):
        @torch.no_grad()
        def step(self):
            (group,) = self.param_groups
            (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                state = self.state[p] or self.state[p].update(t=0, m=0, v=0) or self.state[p]
                state["t"] += 1
                state["m"] = b1 * state["m"] + (1 - b1) * p.grad
                state["v"] = b2 * state["v"] + (1 - b2) * p.grad**2
                m, v = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
                p.sub_(lr * m / (v + eps).sqrt())

    monkeypatch.setattr(
        harness,
        "adam",
        lambda model, p: Inside(model.parameters(), p.unlearn_lr, (p.adam_b1, p.adam_b2), p.adam_eps),
    )
    found = out(case)
    assert {("parameters after 1 step", "fp32"), (f"parameters after {STEPS} steps", "fp64")} <= found
    assert not {("gradients", "fp32"), ("gradients", "fp64")} & found


@pytest.mark.parametrize("stride", [1, 2])
def test_the_fast_depthwise_convolution_is_pytorchs(stride):
    layer = torch.nn.Conv2d(4, 4, 3, stride, 1, groups=4, bias=False, dtype=torch.float64)
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = layer(images)
    (gradient,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    models.use_depthwise_products(layer)
    torch.testing.assert_close(layer(images), expected, rtol=1e-12, atol=1e-14)
    (again,) = torch.autograd.grad(layer(images).square().sum(), layer.weight)
    torch.testing.assert_close(again, gradient, rtol=1e-12, atol=1e-12)


def test_values_that_are_not_finite_are_out():
    nan = {"conv1.weight": torch.full((1,), float("nan")).numpy(), "linear.weight": torch.ones(1).numpy()}
    one = {key: torch.ones(1).numpy() for key in nan}
    for pair in ((nan, one), (one, nan)):
        difference, layer = parity.worst(*pair)
        assert layer == "conv1"
        assert parity.Row("", "", "fp32", 1e300, {"rule": (difference, layer)}).verdict == "OUT"


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs the command line where no images are: (status, stdout, stderr)."""
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda *arguments: (main(["parity", *arguments]), *capsys.readouterr())


@pytest.mark.parametrize("ok", [True, False])
def test_the_command_line_prints_a_table_or_json(script, monkeypatch, ok):
    difference = 1e-6 if ok else float("nan")

    def row(case, name):
        assert case == ("vgg16bn", 100, "digits", 3)  # CIFAR-100's model, on what is there
        found, values = {"rule": (0.0, ""), "class": (difference, "")}, {"PyTorch": 2.25, "rule": 2.25, "class": 2.5}
        return [parity.Row(name, "loss", "fp32", 1e-5, found, values)]

    def make_case(protocol, num_classes, dataset, steps):
        return protocol.model, num_classes, dataset.name, steps

    monkeypatch.setattr(cases, "make_case", make_case)
    monkeypatch.setattr(parity, "compare", row)
    monkeypatch.setattr(parity, "compare_models", lambda case: [])
    command = ("--bench", "vgg16bn-cifar100-class0", "--steps", "3")
    status, printed, _ = script(*command)
    assert status == (0 if ok else 1) and ("OUT" in printed) is not ok
    (line,) = (line.split() for line in printed.splitlines() if line.startswith("scrub"))
    shown = ["1.0e-06", "1.0e-05", "ok"] if ok else ["nan", "1.0e-05", "OUT"]
    assert line == ["scrub", "loss", "fp32", "2.2500", "2.2500", "2.5000", "0.0e+00", *shown]
    assert "digits" in printed and all(name in printed for name in BASELINES)
    status, printed, _ = script(*command, "--method", "scrub", "--json")
    result = json.loads(printed)
    assert (status, result["ok"], result["images"]) == (0 if ok else 1, ok, "digits")
    (only,) = result["rows"]
    assert only["found"]["class"] == {"difference": 1e-6 if ok else None, "layer": ""}
    assert only["values"]["class"] == 2.5 and only["verdict"] == ("ok" if ok else "OUT")


def test_a_row_that_rounding_decides_is_neither_right_nor_wrong():
    row = parity.Row("scrub", "retain_acc", "fp64", 0.6, {"rule": (0.1, "")})
    text = io.StringIO()
    parity.print_rows([row], text)
    assert row.verdict == "open" and "open: " in text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "--bench"),
        ("--bench resnet20-cifar10-class1", "did you mean 'resnet20-cifar10-class0'"),
        (f"--bench {BENCH} --method scrubb", "did you mean 'scrub'"),
        (f"--bench {BENCH} --method retrain", "PyTorch's side has"),
        (f"--bench {BENCH} --steps 0", "--steps 0"),
        (f"--bench {BENCH} --steps many", "invalid int value"),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, arguments, said):
    status, printed, errors = script(*arguments.split())
    assert (status, printed) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_without_pytorch_it_says_what_to_install(script, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxunlearn.torch_reference")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, errors = script("--bench", BENCH)
    assert status == 2 and errors.count("\n") == 1 and ".[parity]" in errors
