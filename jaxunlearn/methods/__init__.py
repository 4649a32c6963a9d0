"""The unlearning rules by name. A rule's name is its file's: `scrub.py` here is `scrub`, `my/rule.py` is `rule`.

A file has a module-level `rule` (see `rule.py` here), or one class of the PyTorch harness (`jaxunlearn.torch_style`).
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.errors import UserError, one_line
from jaxunlearn.methods.rule import UnlearningRule

BASELINES = ("retain_finetune", "negative_gradient", "bad_teacher", "scrub")
RETRAIN = "retrain"  # the reference row: no rule, a model trained from scratch without the forgotten class


class Method(NamedTuple):
    """A rule's factory under the name that tables show, and the hyperparameters it is called with."""

    name: str
    factory: Callable[..., UnlearningRule] | None  # None for `retrain`
    defaults: dict[str, Any]
    hyperparameters: dict[str, Any]
    source: str = ""  # SHA-256 of the rule's file


def names() -> list[str]:
    """Every rule that ships with the package: the modules of this folder, without the contract."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "rule")


def get_method(name: str, settings: dict[str, str] | None = None) -> Method:
    """The method called `name`, or in the file `name`, with `settings` (text) in place of its defaults.

    Raises UserError for an unknown name, a file that is no rule, and an unknown or ill-typed setting.
    """
    if name == RETRAIN:
        return Method(RETRAIN, None, {}, _apply(RETRAIN, {}, settings or {}))
    if name.endswith(".py"):
        title = Path(name).stem
        if title in (*names(), RETRAIN):
            raise UserError(f"{name}: '{title}' is the name of a method of the package: rename the file")
        file, factory = Path(name), _load_file(Path(name))
    elif name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        title, file, factory = name, Path(str(module.__file__)), module.rule
    else:
        nearest = difflib.get_close_matches(name, [*names(), RETRAIN], n=1, cutoff=0)[0]
        raise UserError(f"unknown method '{name}': did you mean '{nearest}'? (a rule file's name ends in .py)")
    defaults = _defaults(title, factory)
    source = hashlib.sha256(file.read_bytes()).hexdigest()
    return Method(title, factory, defaults, _apply(title, defaults, settings or {}), source)


def build_rule(method: Method, context: Any) -> UnlearningRule:
    """Calls the factory. Raises UserError where what it returns is no rule."""
    assert method.factory is not None
    try:
        rule = method.factory(context, **method.hyperparameters)
    except Exception as error:
        raise UserError(f"method '{method.name}': its rule() failed: {one_line(error)}") from error
    if not isinstance(rule, UnlearningRule):
        kind = type(rule).__name__
        raise UserError(f"method '{method.name}': rule(context) returned {kind}, it must return an UnlearningRule")
    return rule


def parse_value(name: str, text: str, default: Any) -> Any:
    """`text` as a value of `default`'s type. Raises UserError where it is none."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, float):
            if not math.isfinite(value := float(text)):
                raise ValueError
            return value
        if isinstance(default, int | str):
            return type(default)(text)
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
        if isinstance(default, tuple):
            items = tuple(type(default[0])(item) for item in value) if default else tuple(value)
            if not isinstance(value, tuple | list) or items != tuple(value):
                raise ValueError
            return items
        return value
    except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
        expected = "true or false" if isinstance(default, bool) else f"a value like {default!r}"
        raise UserError(f"--set {name}={text}: expected {expected}") from None


def _apply(title: str, defaults: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    for key in settings:
        if key not in defaults:
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise UserError(f"--set {title}.{key}: '{title}' has no hyperparameter '{key}' ({known})")
    return defaults | {key: parse_value(f"{title}.{key}", text, defaults[key]) for key, text in settings.items()}


def _defaults(title: str, factory: Any) -> dict[str, Any]:
    if not callable(factory):
        raise UserError(f"method '{title}': `rule` is not callable, it must be a factory rule(context, *, ...)")
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
            json.dumps(parameter.default, allow_nan=False)  # it goes into the record
        except (ValueError, TypeError):
            message = "its default must be a finite number, a text, true or false, None, or a tuple of these"
            raise UserError(f"method '{title}': hyperparameter '{parameter.name}': {message}") from None
    return {p.name: p.default for p in keywords}


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such rule file")
    spec = importlib.util.spec_from_file_location(f"jaxunlearn_rule_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: the rule file failed to import: {one_line(error)}") from error
    if hasattr(module, "rule"):
        return module.rule
    classes = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "unlearn_step")
    }
    if len(classes) > 1:
        several = " and ".join(sorted(cls.__name__ for cls in classes))
        raise UserError(f"{path}: {several} have an `unlearn_step`: add `rule = as_rule(...)` of one of them")
    if not classes:
        raise UserError(f"{path}: the rule file defines no `rule`, and no class with an `unlearn_step`")
    from jaxunlearn.torch_style import as_rule  # here: it is written with this package's `rule`

    (cls,) = classes
    try:
        return as_rule(cls)
    except Exception as error:
        raise UserError(f"{path}: {one_line(error)}") from error
