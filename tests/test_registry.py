"""Methods by name or file, and their hyperparameters; what is none is refused in one line."""

from pathlib import Path

import jax
import numpy as np
import pytest
from test_methods import FORGET, RETAIN, ce, context, forward, model
from tiny import assert_close, assert_differ

from jaxunlearn.errors import UserError
from jaxunlearn.registry import RETRAIN, build_rule, get_method, parse_value

pytestmark = pytest.mark.usefixtures("tiny_models")


def refused(message):
    return pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$")


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [("2", 4.0, 2.0), ("1e-3", 0.1, 0.001), ("3", 2, 3), ("-1", 2, -1), ("true", False, True), ("True", False, True),
     ("0", True, False), ("FALSE", True, False), ("abc", "x", "abc"), ("(3, 4)", (1, 2), (3, 4)),
     ("1, 2, 3", (0.5,), (1.0, 2.0, 3.0)), ("[1]", (), (1,)), ("None", None, None), ("5", None, 5),
     ("abc", None, "abc")],  # as `as_typed` writes it
)  # fmt: skip
def test_a_setting_takes_the_type_of_its_default(text, default, value):
    parsed = parse_value("m.k", text, default)
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, parsed)) == list(map(type, value))


@pytest.mark.parametrize(
    ("text", "default"),
    [("two", 4.0), ("", 4.0), ("nan", 4.0), ("inf", 4.0), ("2.5", 2), ("2", True), ("yes", False), ("5", (1, 2)),
     ("(1, 'a')", (1, 2)), ("(1,", (1, 2)), ("(1.5, 2)", (1, 2))],
)  # fmt: skip
def test_a_setting_of_another_type_is_refused(text, default):
    with refused("--set m.k=.*: expected "):
        parse_value("m.k", text, default)


def test_settings_replace_defaults_and_only_known_ones():
    method = get_method("scrub", {"temperature": "2", "forget_epochs": "3"})
    assert method.defaults == {"temperature": 4.0, "gamma": 0.99, "alpha": 0.01, "forget_epochs": 2}
    assert method.hyperparameters == method.defaults | {"temperature": 2.0, "forget_epochs": 3}
    for name, known in (
        ("scrub", "it has temperature, gamma"),
        ("retain_finetune", "it has none"),
        (RETRAIN, "it has none"),
    ):
        with refused(f"--set {name}.beta: '{name}' has no hyperparameter 'beta' .{known}"):
            get_method(name, {"beta": "1"})


def test_an_unknown_method_names_the_nearest():
    with refused("unknown method 'scrubb': did you mean 'scrub'"):
        get_method("scrubb")


LOSS = """
from jaxunlearn.methods.rule import cross_entropy, loss_rule

@loss_rule
def rule(student, retain, forget, *, weight: float = 0.5):
    forget_loss = cross_entropy(student(forget.images), forget.labels)
    return cross_entropy(student(retain.images), retain.labels) - weight * forget_loss
"""


def test_a_users_loss_is_a_method(tmp_path):
    (tmp_path / "my_loss.py").write_text(LOSS)
    method = get_method(str(tmp_path / "my_loss.py"), {"weight": "2"})
    assert (method.name, method.defaults, method.hyperparameters) == ("my_loss", {"weight": 0.5}, {"weight": 2.0})
    rule = build_rule(method, context())
    params, state, metrics = jax.jit(rule.step)(model(1)[0], rule.init(*model(0), jax.random.key(3)), RETAIN, FORGET)
    expected = ce(forward(RETAIN.images)[0], RETAIN) - 2 * ce(forward(FORGET.images)[0], FORGET)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_differ(params, model(1)[0])
    # The statistics move in the order of the calls.
    assert_close(state.batch_stats, forward(RETAIN.images, forward(FORGET.images)[1])[1], 1e-5)


def test_the_digest_of_a_rule_is_of_all_that_it_is_made_of(monkeypatch):
    """So that its unlearning starts afresh when one of them changes."""
    before = {name: get_method(name).source for name in ("lfssd", "eu_k", "negate_first", "salun", "scrub")}
    changed = {"ssd": "lfssd", "cf_k": "eu_k", "retain_finetune": "negate_first", "masks": "salun"}
    read = Path.read_bytes
    for part, name in changed.items():
        monkeypatch.setattr(Path, "read_bytes", lambda path, part=part: read(path) + b" " * (path.stem == part))
        assert get_method(name).source != before[name] and get_method("scrub").source == before["scrub"]


def test_what_a_method_reads_is_in_its_docstring_or_its_files(tmp_path):
    assert get_method("scrub").reads == "retain, forget images" and get_method(RETRAIN).reads == "retain"
    own = 'def rule(context):\n    "Own.\\n\\n    Reads: forget,\\n    a pass over all. More."\n'
    for name, text, reads in (
        ("mine.py", f'"Reads: retain."\n{own}', "forget, a pass over all"),
        ("file.py", f'"Mine. Reads: this no.\\nReads: retain."\n{LOSS}', "retain"),
        ("silent.py", LOSS, ""),
    ):
        (tmp_path / name).write_text(text)
        assert get_method(str(tmp_path / name)).reads == reads


CLASS = """
from __future__ import annotations
import dataclasses
from jaxunlearn.torch_style import UnlearningMethod

@dataclasses.dataclass
class Mine(UnlearningMethod):
    weight: float = 0.5
    epochs: int = 2

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        return {"loss": self.weight}
"""


def test_a_users_class_is_a_method(tmp_path):
    (tmp_path / "my_class.py").write_text(CLASS)
    method = get_method(str(tmp_path / "my_class.py"), {"weight": "2"})
    assert (method.name, method.hyperparameters) == ("my_class", {"weight": 2.0, "epochs": 2})
    rule = build_rule(method, context())
    *_, metrics = rule.step(model(1)[0], rule.init(*model(0), jax.random.key(3)), RETAIN, FORGET)
    assert metrics["loss"] == 2


def test_of_several_classes_a_file_names_one(tmp_path):
    (tmp_path / "mine.py").write_text(CLASS + "class Other(Mine):\n    pass\n")
    with refused(r"mine.py: Mine and Other have an `unlearn_step`: add `rule = as_rule\(Other\)` at the end"):
        get_method(str(tmp_path / "mine.py"))
    text = "from jaxunlearn.torch_style import as_rule\n" + "rule = as_rule(Other)"
    (tmp_path / "mine.py").write_text(CLASS + "class Other(Mine):\n    weight: float = 0.75\n" + text)
    assert get_method(str(tmp_path / "mine.py")).defaults["weight"] == 0.5


@pytest.mark.parametrize(
    "base",
    [
        "import abc\nclass Base(abc.ABC):\n    @abc.abstractmethod\n    def unlearn_step(self): pass\n",
        "from jaxunlearn.torch_style import UnlearningMethod\nclass Base(UnlearningMethod): pass\n",
    ],
)
def test_a_base_class_without_a_step_is_no_method(tmp_path, base):
    (tmp_path / "mine.py").write_text(base)
    with refused("no class with an `unlearn_step`"):
        get_method(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text(f"{base}class Mine(Base):\n    def unlearn_step(self): pass\n")
    assert get_method(str(tmp_path / "mine.py")).defaults == {}


ARGUMENTS = "class Mine:\n    def __init__(self, {}): pass\n    def unlearn_step(self): pass"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("gone.py", None, "gone.py: no such rule file"),
        ("mine.py", "def rule(context:", "failed to import: SyntaxError"),
        ("mine.py", "import not_a_module", "failed to import: ModuleNotFoundError: No module named 'not_a_module'"),
        ("mine.py", "import torch_absent.nn", "failed to import: torch's functions take no JAX arrays"),
        ("mine.py", "raise SystemExit(3)", "failed to import: SystemExit"),
        ("mine.py", "raise ValueError('a\\nb')", "failed to import: ValueError: a b"),
        ("mine.py", "def rules(context): pass", "the rule file defines no `rule`"),
        ("mine.py", "class Mine: pass", "the rule file defines no `rule`, and no class with an `unlearn_step`"),
        ("mine.py", "from jaxunlearn.torch_style import UnlearningMethod", "and no class with an `unlearn_step`"),
        ("mine.py", ARGUMENTS.format("weight"), "'mine': hyperparameter 'weight' needs a default"),
        ("mine.py", ARGUMENTS.format("weight=print"), "'mine': hyperparameter 'weight': its default must be"),
        ("mine.py", ARGUMENTS.format("**settings"), r"write Mine.__init__\(self, hyperparameters with defaults\)"),
        ("mine.py", ARGUMENTS.format("context=1"), "duplicate parameter name: 'context'"),
        ("mine.py", "rule = 3", "'mine': `rule` is not callable"),
        ("mine.py", "def rule(): pass", r"write rule\(context, \*, hyperparameters with defaults\)"),
        ("mine.py", "def rule(context, weight=1.0): pass", r"write rule\(context, \*, "),
        ("mine.py", "def rule(context, **settings): pass", r"write rule\(context, \*, "),
        ("mine.py", "def rule(*, context=None): pass", r"write rule\(context, \*, "),
        ("mine.py", "def rule(context, *, weight): pass", "'mine': hyperparameter 'weight' needs a default"),
        ("scrub.py", "def rule(context): pass", "'scrub' is the name of a method of the package: rename the file"),
        ("retrain.py", "def rule(context): pass", "'retrain' is the name of a method of the package"),
        ("pretrained.py", "def rule(context): pass", "'pretrained' is the name of a method of the package"),
    ],
)
def test_a_file_that_is_no_rule_is_refused(tmp_path, file, text, message):
    if text is not None:
        (tmp_path / file).write_text(text)
    with refused(message):
        get_method(str(tmp_path / file))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"rule\(context\) returned NoneType, it must return an UnlearningRule"),
        ("return lambda *args: args", "returned function, it must return an UnlearningRule"),
        ("return context.momentum", r"'mine': its rule\(\) failed: AttributeError"),
        ("raise ValueError('a\\nb')", r"'mine': its rule\(\) failed: ValueError: a b"),
    ],
)
def test_a_factory_that_makes_no_rule_is_refused(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def rule(context):\n    {body}")
    with refused(message):
        build_rule(get_method(str(tmp_path / "mine.py")), context())
