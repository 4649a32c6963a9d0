"""The command line that gives a record again."""

import dataclasses
import itertools
import shlex
from collections.abc import Sequence

from jaxunlearn.benchmarks import ATTEMPTS, EVALUATIONS, FLAGS, SWITCHES, get_benchmark
from jaxunlearn.registry import RETRAIN, Method, as_typed, names
from jaxunlearn.runs.request import Request, settled, with_retrain


def command_of(request: Request, method: Method) -> str | None:
    """The command that gives this method's records again, without folders; None where no file has the method."""
    if not method.source and method.name != RETRAIN:
        return None
    own, used = dataclasses.asdict(get_benchmark(request.bench)), dataclasses.asdict(request.protocol)
    changes = {k: v for k, v in used.items() if v != own[k]}
    if used["precision"] != settled(get_benchmark(request.bench), ()).precision:
        changes |= {"precision": used["precision"]}  # the platform's own would be another
    hyperparameters = {k: v for k, v in method.hyperparameters.items() if v != method.defaults[k]}
    shipped = method.name in (*names(), RETRAIN)
    words = ["jaxunlearn", "bench", "--bench", request.bench, "--method", method.name + ("" if shipped else ".py")]
    words += ["--seeds", seeds_as_typed(request.seeds)]
    words += ["--unlearn-seeds", str(request.unlearn_seeds)] if request.unlearn_seeds > 1 else []
    compares = any(one.name == RETRAIN for one in request.methods)
    if method.name != RETRAIN and compares != with_retrain(request.bench, None):
        words.append("--against-retrain" if compares else "--no-against-retrain")
    words += ["--evaluate", request.evaluate] if request.evaluate != EVALUATIONS[0] else []
    words += ["--attempts", str(request.attempts)] if request.attempts != ATTEMPTS else []
    for key, value in changes.items():
        flag = "--" + key.replace("_", "-")
        if key == "init_weights":
            words += [flag, request.init_weights.name if request.init_weights else "FILE"]
        elif key in SWITCHES:
            words += [flag] if value else []
        elif key in FLAGS:
            words += [flag, str(value)]
        else:
            words += ["--set", f"protocol.{key}={as_typed(value)}"]
    for key, value in hyperparameters.items():
        words += ["--set", f"{method.name}.{key}={as_typed(value)}"]
    words += ["--devices", str(request.devices)] if request.devices else []
    return shlex.join([*words, "--deterministic"] if request.deterministic else words)


def seeds_as_typed(seeds: Sequence[int]) -> str:
    """The text that `parse_seeds` makes these seeds of."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(seeds), lambda pair: pair[1] - pair[0]):
        first, *rest = (seed for _, seed in run)
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ",".join(parts)
