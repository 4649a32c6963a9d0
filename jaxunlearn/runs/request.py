"""What a user asks for, from the command line or from Python, and where its results go."""

import dataclasses
import hashlib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxunlearn.benchmarks import (
    AGAINST_RETRAIN,
    ATTEMPTS,
    EVALUATIONS,
    MOST_SEEDS,
    Protocol,
    get_benchmark,
)
from jaxunlearn.devices.configuration import default_precision
from jaxunlearn.errors import UserError
from jaxunlearn.models.state_dicts import shortcut
from jaxunlearn.models.weight_files import read_weights
from jaxunlearn.registry import (
    PRETRAINED,
    REFERENCES,
    RETRAIN,
    Method,
    Named,
    get_method,
    members_of,
    parse_value,
    title_of,
)
from jaxunlearn.results.records import record_path

# Fields of the protocol that are not for `set`: what the benchmark is, and the weights, which have an argument.
FIXED = ("init_weights", "model", "dataset")

Settings = dict[str, dict[str, str]]  # values as text, by key, by what has it: a method, or "protocol"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    bench: str
    protocol: Protocol
    methods: Sequence[Method]
    seeds: Sequence[int]
    out: Path
    cache_dir: Path
    data_dir: Path | None = None
    init_weights: Path | None = None
    export_weights: Path | None = None
    devices: int | None = None
    deterministic: bool = False
    save_every: float = 120.0  # seconds between two checkpoints
    attempts: int = ATTEMPTS  # at most, at pretraining a seed that learns nothing
    unlearn_seeds: int = 1  # unlearnings of each original
    evaluate: str = EVALUATIONS[0]
    eval_every: int | None = None  # epochs of unlearning between two evaluations on the way; None: there are none
    keep_predictions: bool = False
    tensorboard: Path | None = None  # where event files go
    force: bool = False
    together: int | None = None  # at most so many variants of a rule at once; None: on a CPU one, else all
    once: bool = False  # whoever asks will not ask again for what is done: nothing of it is kept to go on from

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the protocol that are not the benchmark's own."""
        own, used = dataclasses.asdict(get_benchmark(self.bench)), dataclasses.asdict(self.protocol)
        return {name: value for name, value in used.items() if value != own[name]}

    def draws(self, method: Method) -> int:
        """How many unlearnings of each original there are by a method: one by a reference, which draws nothing."""
        return 1 if method.name in REFERENCES else self.unlearn_seeds

    def record_path(self, method: Method, seed: int, unlearn_seed: int = 0) -> Path:
        """Where a method's record of a seed is kept: apart from the benchmark's own on a CPU if anything differs."""
        differs = self.changes | {f"{method.name}.{name}": value for name, value in method.changes.items()}
        if (platform := jax.default_backend()) != "cpu":
            differs |= {"platform": platform, "device_kind": jax.devices()[0].device_kind}
        return record_path(self.out, self.bench, method.name, seed, differs, unlearn_seed)

    def path_of(self, record: Mapping[str, Any]) -> Path:
        """Where a record that this run made is kept."""
        own = record["method"], record["hyperparameters"]
        method = next(method for method in self.methods if (method.name, method.hyperparameters) == own)
        return self.record_path(method, record["seed"], record["unlearn_seed"])

    def originals_path(self, seed: int) -> Path:
        """Where it is kept what the pretrained model of a seed says."""
        return self.record_path(Method(PRETRAINED, None, {}, {}), seed).with_suffix(".npz")

    @property
    def settings(self) -> tuple[Any, ...]:
        """What every process of a run must have been told alike."""
        methods = [(method.name, method.hyperparameters, method.source) for method in self.methods]
        told = self.devices, self.deterministic, self.attempts, self.export_weights is not None
        asked = self.unlearn_seeds, self.evaluate, self.eval_every, self.keep_predictions, self.together
        return self.bench, self.protocol, methods, self.seeds, *told, *asked

    def weights_path(self, record: Path) -> Path | None:
        """Where the model of a record goes: below `export_weights` what the record is below `out`."""
        if self.export_weights is None:
            return None
        return self.export_weights / record.relative_to(self.out).with_suffix(".safetensors")


def parse_seeds(text: str) -> list[int]:
    """The seeds of "42", "0-7" or "1,5,9", in order. Raises UserError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not 0 < len(span) <= MOST_SEEDS:
                raise ValueError
            seeds += span
    except (ValueError, OverflowError):
        seeds = []
    if not 0 < len(seeds) <= MOST_SEEDS or len(set(seeds)) != len(seeds) or max(seeds) >= 2**32:
        raise UserError(
            f"--seeds {text}: write 42, 0-7 or 1,5,9, each seed once, from 0 to {2**32 - 1}, {MOST_SEEDS:,} at most"
        )
    return seeds


def parse_settings(
    pairs: Sequence[str], flag: str = "--set", example: str = "VALUE, such as scrub.temperature=2"
) -> Settings:
    """`["scrub.temperature=2"]` as `{"scrub": {"temperature": "2"}}`. Raises UserError for what is no such pair."""
    settings: Settings = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        owner, _, key = name.rpartition(".")
        if not (owner and key and value):
            raise UserError(f"{flag} {pair}: write NAME.KEY={example}")
        settings.setdefault(owner, {})[key] = value
    return settings


def make_protocol(
    bench: str, changes: Mapping[str, Any], settings: Mapping[str, str], init_weights: Path | None
) -> Protocol:
    """The benchmark's protocol with what the user changed: values, and texts of values. Raises UserError.

    The shortcut of a ResNet-20 is that of the weights, unless the user says which.
    """
    own = get_benchmark(bench)
    fields = dataclasses.asdict(own)
    for key in settings:
        if key not in fields or key in FIXED:
            known = ", ".join(name for name in fields if name not in FIXED)
            raise UserError(f"--set protocol.{key}: no such field (there are {known})")
    parsed = {key: parse_value(f"protocol.{key}", text, fields[key]) for key, text in settings.items()}
    if init_weights is not None:
        parsed["init_weights"] = _digest(init_weights)
        if own.model == "resnet20" and "resnet_shortcut" not in {*changes, *parsed}:
            parsed["resnet_shortcut"] = shortcut(read_weights(init_weights))
    return dataclasses.replace(own, **changes, **parsed)


def settled(protocol: Protocol, chosen: Container[str]) -> Protocol:
    """The protocol in the platform's precision, unless the benchmark has another or it is among the `chosen` fields."""
    if "precision" in chosen or protocol.precision != "fp32":
        return protocol
    return dataclasses.replace(protocol, precision=default_precision())


def _digest(weights: Path) -> str:
    if not os.path.isfile(weights):  # a device or a pipe may never end
        raise UserError(f"--init-weights {weights}: no such file")
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--init-weights {weights}: {error.strerror}") from None


def with_retrain(bench: str, wish: bool | None) -> bool:
    """Whether `retrain` is run beside the methods of a benchmark unasked, or because the user has said so."""
    return bench in AGAINST_RETRAIN if wish is None else wish


def get_methods(chosen: Iterable[Named] | None, settings: Settings, against_retrain: bool = False) -> list[Method]:
    """The methods of a run with their settings, groups by their members; None is the baselines and the output mask.

    `retrain` comes first where it is among them or wished for: the others are compared with it. Raises UserError for
    settings of others.
    """
    given: list[Named] = ["baselines", "output_mask"] if chosen is None else list(chosen)
    named: list[Named] = []
    for method in given:
        members = members_of(method) if isinstance(method, str) else ()
        named += [one for one in members if one not in (*given, *named)] if members else [method]
    if not named:
        raise UserError("--method: name at least one method")
    if against_retrain and RETRAIN not in named:
        named = [RETRAIN, *named]
    named.sort(key=lambda method: method != RETRAIN)
    titles = [title_of(method) for method in named]
    methods = [get_method(method, settings.get(title)) for method, title in zip(named, titles, strict=True)]
    for owner, values in settings.items():
        if owner not in titles:
            raise UserError(f"--set {owner}.{next(iter(values))}: '{owner}' is not among the methods of this run")
    if len(set(titles)) != len(titles):
        raise UserError("--method: each method once, and no two files of the same name")
    return methods
