"""Methods by name: the package's rules, files with a user's own, and functions and classes given from Python.

A rule's name is its file's: `methods/scrub.py` is `scrub`, `my/rule.py` is `rule`. A file has a module-level `rule`
(see `methods/rule.py`), or one class of the PyTorch harness (`jaxunlearn.torch_style`).
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxunlearn import methods
from jaxunlearn.errors import UserError, blamed
from jaxunlearn.methods.rule import UnlearningRule
from jaxunlearn.torch_style import UnlearningMethod, as_rule
from jaxunlearn.torch_style.advice import advice

Named = str | Path | Callable[..., Any]  # a method as users name it: by name, by file, or itself

BASELINES = ("retain_finetune", "negative_gradient", "bad_teacher", "scrub")
SUBMITTED = ("adaptive_uniform", "importance_masked", "zeroed_logit", "fisher_pcgrad")  # to the task, by others
PARTS = ("jaxunlearn.methods.", "jaxunlearn.ingredients.")  # what rules that ship are made of
LONGEST_TITLE = 180  # bytes of a file's name; file systems allow 255, of which a checkpoint's lock needs 75
RETRAIN = "retrain"  # the reference row: no rule, a model trained from scratch without the forgotten class
PRETRAINED = "pretrained"  # the row of the models before unlearning, which no method may be named like
REFERENCES = (RETRAIN, "output_mask")  # what others are compared with, above and below; none is a way to unlearn


class Method(NamedTuple):
    """A rule's factory under the name that tables show, and the hyperparameters it is called with."""

    name: str
    factory: Callable[..., UnlearningRule] | None  # None for `retrain`
    defaults: dict[str, Any]
    hyperparameters: dict[str, Any]
    source: str = ""  # SHA-256 of the rule's file, of one that ships also of those that it is made of; empty where it
    # has none, and nobody can say what it depends on
    reads: str = ""  # which data the rule reads, by its docstring; empty where that does not say
    ranges: Any = None  # what the rule's file says of where to look for hyperparameters; None where it says nothing

    @property
    def changes(self) -> dict[str, Any]:
        """The hyperparameters that are not the defaults."""
        return {name: value for name, value in self.hyperparameters.items() if value != self.defaults[name]}


def names() -> list[str]:
    """Every rule that ships with the package: the modules of `methods`, without the contract."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__) if module.name != "rule")


def ships(name: str) -> bool:
    """Whether a method of this name is the package's own: nobody else's can have it."""
    return name in (*names(), RETRAIN)


def members_of(group: str) -> tuple[str, ...]:
    """The methods that a name stands for: "baselines", "submitted", or "all" that ship; none of any other name."""
    return {"baselines": BASELINES, "submitted": SUBMITTED, "all": tuple(names())}.get(group, ())


def title_of(method: Named) -> str:
    """The name that tables show: a method's own, its file's, or its function's or class's."""
    if callable(method):
        return getattr(method, "__name__", type(method).__name__)
    text = str(method)
    return Path(text).stem if text.endswith(".py") else text


def get_method(method: Named, settings: dict[str, str] | None = None) -> Method:
    """A method by name, file, function or class, with `settings` (text) in place of its defaults.

    A function is a rule's factory, such as `loss_rule` makes; a class has an `unlearn_step`, as in the PyTorch harness.

    Raises UserError for an unknown name, a file that is no rule, and an unknown or ill-typed setting.
    """
    title, text, source, ranges = title_of(method), str(method), "", None
    if text == RETRAIN:
        return Method(RETRAIN, None, {}, _apply(RETRAIN, {}, settings or {}), reads="retain")
    if callable(method):
        _check_title(title, f"the method '{title}'", "the function or class", title.isidentifier())
        factory = _of_class(method) if isinstance(method, type) else method
    elif text.endswith(".py"):
        _check_title(title, text, "the file", title.isprintable() and not title.startswith("."))
        factory, ranges = _load_file(Path(text))
        source = hashlib.sha256(Path(text).read_bytes()).hexdigest()
    elif title in names():
        module = importlib.import_module(f"{methods.__name__}.{title}")
        factory, ranges = module.rule, getattr(module, "ranges", None)
        source = hashlib.sha256(b"".join(_files_of(module, {}).values())).hexdigest()
    else:
        nearest = difflib.get_close_matches(title, [*names(), RETRAIN], n=1, cutoff=0)[0]
        raise UserError(f"unknown method '{title}': did you mean '{nearest}'? (a rule file's name ends in .py)")
    defaults = _defaults(title, factory)
    applied, reads = _apply(title, defaults, settings or {}), sentence(factory, "Reads")
    return Method(title, factory, defaults, applied, source, reads, ranges)


def _files_of(module: ModuleType, found: dict[str, bytes]) -> dict[str, bytes]:
    """The content of a rule's file and of those that it is made of: of other rules and of `ingredients`, by name."""
    found[module.__name__] = Path(str(module.__file__)).read_bytes()
    for value in vars(module).values():
        name = str(getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", ""))
        if name.startswith(PARTS) and name not in (*found, UnlearningRule.__module__):
            _files_of(sys.modules[name], found)
    return found


def _check_title(title: str, given: str, kind: str, plain: bool) -> None:
    """Raises UserError for a name that results cannot have: it will be printed, and a part of a folder's name."""
    if ships(title) or title == PRETRAINED:
        raise UserError(f"{given}: '{title}' is the name of a method of the package: rename {kind}")
    if not plain or len(os.fsencode(title)) > LONGEST_TITLE:
        raise UserError(f"{given}: its results could not be named like it: rename {kind}, to letters and digits")


def build_rule(method: Method, context: Any) -> UnlearningRule:
    """Calls the factory. Raises UserError where what it returns is no rule."""
    assert method.factory is not None
    with blamed(f"method '{method.name}': its rule() failed"):
        rule = method.factory(context, **method.hyperparameters)
    if not isinstance(rule, UnlearningRule):
        kind = type(rule).__name__
        raise UserError(f"method '{method.name}': rule(context) returned {kind}, it must return an UnlearningRule")
    return rule


def parse_value(name: str, text: str, default: Any) -> Any:
    """`text` as a value of `default`'s type, where that is None as a literal or itself.

    Raises UserError where it is none.
    """
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, float):
            if not math.isfinite(value := float(text)):
                raise ValueError
            return value
        if isinstance(default, int | str):
            return int(text) if isinstance(default, int) else text
        literal: Any = ast.literal_eval(text) if default is not None else _literal_or_text(text)
        _check_json(literal)
        if isinstance(default, tuple):
            items = tuple(type(default[0])(item) for item in literal) if default else tuple(literal)
            if not isinstance(literal, tuple | list) or items != tuple(literal):
                raise ValueError
            return items
        return literal
    except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        expected = "true or false" if isinstance(default, bool) else f"a value like {default!r}"
        raise UserError(f"--set {name}={text}: expected {expected}") from None


def _literal_or_text(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def as_typed(value: Any) -> str:
    """The text that `parse_value` makes this value of."""
    return value if isinstance(value, str) else repr(value)


def _apply(title: str, defaults: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    for key in settings:
        if key not in defaults:
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise UserError(f"--set {title}.{key}: '{title}' has no hyperparameter '{key}' ({known})")
    return defaults | {key: parse_value(f"{title}.{key}", text, defaults[key]) for key, text in settings.items()}


def _defaults(title: str, factory: Any) -> dict[str, Any]:
    if not callable(factory):
        raise UserError(f"method '{title}': `rule` is not callable, it must be a factory rule(context, *, ...)")
    with blamed(f"method '{title}'"):
        try:
            parameters = list(inspect.signature(factory).parameters.values())
        except ValueError:
            parameters = []  # a builtin that does not say what it takes
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(parameters) != len(keywords) + 1:
        raise UserError(f"method '{title}': write rule(context, *, hyperparameters with defaults)")
    for parameter in keywords:
        if parameter.default is parameter.empty:
            raise UserError(f"method '{title}': hyperparameter '{parameter.name}' needs a default")
        try:
            _check_json(parameter.default)
        except (ValueError, TypeError, RecursionError):
            message = "its default must be a finite number, a text, true or false, None, or a tuple of these"
            raise UserError(f"method '{title}': hyperparameter '{parameter.name}': {message}") from None
    return {p.name: p.default for p in keywords}


def sentence(factory: Any, word: str) -> str:
    """What a docstring says in "<word>: ...", up to a full stop: the factory's own, else its file's, else nothing."""
    file = sys.modules.get(str(getattr(factory, "__module__", "")))
    pattern = re.compile(rf"^\s*{word}: (.+?)\.(?:\s|\Z)", re.MULTILINE | re.DOTALL)
    for text in (getattr(factory, "__doc__", None), getattr(file, "__doc__", None)):
        if isinstance(text, str) and (found := pattern.search(text)):
            return " ".join(found[1].split())
    return ""


def _of_class(cls: type) -> Callable[..., UnlearningRule]:
    with blamed(f"method '{cls.__name__}'"):
        if not _has_step(cls):
            raise UserError("the class has no `unlearn_step`")
        return as_rule(cls)


def _has_step(cls: type) -> bool:
    """Whether a class can be a method: a base class whose `unlearn_step` is still to be written cannot."""
    step = getattr(cls, "unlearn_step", None)
    return step is not None and step is not UnlearningMethod.unlearn_step and not inspect.isabstract(cls)


def _check_json(value: Any) -> None:
    """Raises what json.dumps raises where a value cannot go into a record and, sorted, into its folder's name."""
    json.dumps(value, allow_nan=False, sort_keys=True)


def _load_file(path: Path) -> tuple[Any, Any]:
    """A file's factory and its `ranges`."""
    if not os.path.isfile(path):  # unlike Path's own, of any text
        raise UserError(f"{path}: no such rule file")
    spec = importlib.util.spec_from_file_location(f"jaxunlearn_rule_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    with blamed(f"{path}: the rule file failed to import"):
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            raise UserError(advice(error)) from error
    if "rule" in vars(module):
        return module.rule, vars(module).get("ranges")
    with blamed(str(path)):
        classes = {
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__ and _has_step(value)
        }
        if len(classes) > 1:
            several = " and ".join(sorted(cls.__name__ for cls in classes))
            last = max(classes, key=lambda cls: (len(cls.__mro__), cls.__name__)).__name__  # mostly what is derived
            write = f"add `rule = as_rule({last})` at the end and `from jaxunlearn.torch_style import as_rule` above"
            raise UserError(f"{several} have an `unlearn_step`: {write}")
        if not classes:
            raise UserError("the rule file defines no `rule`, and no class with an `unlearn_step`")
        return as_rule(*classes), vars(module).get("ranges")
