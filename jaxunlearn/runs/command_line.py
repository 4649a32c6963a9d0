"""The command line that gives a record again."""

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence

from jaxunlearn.benchmarks import ATTEMPTS, EVALUATIONS, FLAGS, SWITCHES, get_benchmark
from jaxunlearn.registry import RETRAIN, Method, as_typed, ships
from jaxunlearn.runs.request import Request, settled, with_retrain


def command_of(request: Request, method: Method) -> str | None:
    """The command that gives this method's records again, without folders; None where no file has the method."""
    if not method.source and method.name != RETRAIN:
        return None
    words = ["jaxunlearn", "bench", *_run_words(request, method)]
    compares = any(one.name == RETRAIN for one in request.methods)
    if method.name != RETRAIN and compares != with_retrain(request.bench, None):
        words.append("--against-retrain" if compares else "--no-against-retrain")
    words += ["--evaluate", request.evaluate] if request.evaluate != EVALUATIONS[0] else []
    words += ["--eval-every", str(request.eval_every)] if request.eval_every else []
    words += _protocol_words(request) + _set_words(method)
    return shlex.join(words + _where_words(request))


def audit_command(request: Request, method: Method) -> str:
    """The command that audits this method alone as the request does, without folders."""
    words = ["jaxunlearn", "audit", *_method_words(request, method), "--models", str(len(request.seeds))]
    return shlex.join(words + _protocol_words(request) + _set_words(method) + _where_words(request))


def tune_command(request: Request, method: Method, trials: int, held: Iterable[str], ranges: Mapping[str, str]) -> str:
    """The command that tunes this method alone as the request does, without folders.

    Args:
      held: hyperparameters that are set, to the method's own values.
      ranges: those that were asked for, as typed.
    """
    words = ["jaxunlearn", "tune", *_run_words(request, method), "--trials", str(trials)]
    words += [word for word in _protocol_words(request) if word != "--validation"]
    for key in held:
        words += ["--set", f"{method.name}.{key}={as_typed(method.hyperparameters[key])}"]
    for key, text in ranges.items():
        words += ["--range", f"{method.name}.{key}={text}"]
    words += ["--together", str(request.together)] if request.together else []
    return shlex.join(words + _where_words(request))


def _method_words(request: Request, method: Method) -> list[str]:
    return ["--bench", request.bench, "--method", method.name + ("" if ships(method.name) else ".py")]


def _set_words(method: Method) -> list[str]:
    return [
        word for key, value in method.changes.items() for word in ("--set", f"{method.name}.{key}={as_typed(value)}")
    ]


def _run_words(request: Request, method: Method) -> list[str]:
    words = [*_method_words(request, method), "--seeds", seeds_as_typed(request.seeds)]
    return words + (["--unlearn-seeds", str(request.unlearn_seeds)] if request.unlearn_seeds > 1 else [])


def _protocol_words(request: Request) -> list[str]:
    changes, precision = request.changes, request.protocol.precision
    if precision != settled(get_benchmark(request.bench), ()).precision:
        changes |= {"precision": precision}  # the platform's own would be another
    words = ["--attempts", str(request.attempts)] if request.attempts != ATTEMPTS else []
    for key, value in changes.items():
        flag = "--" + key.replace("_", "-")
        if key == "init_weights":
            words += [flag, request.init_weights.name if request.init_weights else "FILE"]
        elif key in SWITCHES:
            words += [flag if value else f"--no-{flag[2:]}"]
        elif key in FLAGS:
            words += [flag, str(value)]
        else:
            words += ["--set", f"protocol.{key}={as_typed(value)}"]
    return words


def _where_words(request: Request) -> list[str]:
    words = ["--devices", str(request.devices)] if request.devices else []
    return [*words, "--deterministic"] if request.deterministic else words


def seeds_as_typed(seeds: Sequence[int]) -> str:
    """The text that `parse_seeds` makes these seeds of."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(seeds), lambda pair: pair[1] - pair[0]):
        first, *rest = (seed for _, seed in run)
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ",".join(parts)
