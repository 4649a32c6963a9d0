"""The benchmark from Python: `jaxunlearn.run`. Nothing here loads JAX before a run does."""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxunlearn.benchmarks import ATTEMPTS, EVALUATIONS
from jaxunlearn.errors import UserError, one_line
from jaxunlearn.files import default_cache

if TYPE_CHECKING:
    import pandas

Named = str | Path | Callable[..., Any]  # a method: by name, by file, or itself


class Records(list[dict[str, Any]]):
    """Result records, one a method and seed, in the order in which they were made: plain data, as in the files."""

    def __init__(
        self, records: Iterable[dict[str, Any]], facts: Mapping[str, Any], report: Callable[[Path], Iterable[str]]
    ):
        super().__init__(records)
        self._facts, self._report = facts, report

    def table(self) -> str:
        """The table that the command prints: methods ranked, mean and interval over seeds, the published rows."""
        from jaxunlearn.results.tables import print_results

        text = io.StringIO()
        print_results(self, **self._facts, file=text)
        return text.getvalue()

    def report(self, path: str | Path) -> None:
        """Writes a page of the results to look at; an earlier report is replaced. Needs matplotlib and jinja2.

        Warns of pictures that are left out. Raises UserError, as where `path` has something else.
        """
        for line in self._report(Path(path)):
            warnings.warn(line, stacklevel=2)

    def frame(self) -> "pandas.DataFrame":
        """A row a record, a column a value, such as `retain_acc` and `before.retain_acc`. Needs pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise UserError("frame() needs pandas: pip install pandas") from None
        return pandas.json_normalize(self)


def run(
    bench: str,
    methods: Named | Iterable[Named] | None = None,
    seeds: int | Iterable[int] | str = 42,
    *,
    set: Mapping[str, Any] | None = None,
    init_weights: str | Path | None = None,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    out: str | Path = "runs",
    export_weights: str | Path | None = None,
    devices: int | None = None,
    deterministic: bool = False,
    save_every: float = 120.0,
    attempts: int = ATTEMPTS,
    unlearn_seeds: int = 1,
    against_retrain: bool | None = None,
    evaluate: str = EVALUATIONS[0],
    eval_every: int | None = None,
    keep_predictions: bool = False,
    tensorboard: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
    **protocol: Any,
) -> Records:
    """Runs a benchmark, as `jaxunlearn bench` does: pretrain (or load), unlearn with each method, evaluate, record.

    Pretrained models and compiled programs stay in the cache folder, an interrupted run goes on where it was when it is
    called again (Ctrl-C saves first, then raises KeyboardInterrupt), and records go to `out`. JAX's settings that were
    made before are kept. For several processes call `jax.distributed.initialize` first.

    Args:
      bench: the benchmark's name, such as "resnet20-digits-class0".
      methods: names, groups of them ("baselines", "submitted", "all"), rule files, or rules themselves: functions as
        `loss_rule` makes them, classes with an `unlearn_step`. None: the four baselines and the output mask. Nobody can
        say what a function depends on, so an interrupted unlearning by one starts again at its first step.
      seeds: several train together; "0-7" is understood too.
      set: hyperparameters, such as {"scrub.temperature": 2}.
      init_weights: a file of a PyTorch state_dict to start from, in place of pretraining.
      data_dir: where the images are, a folder or a file; else $JAXUNLEARN_DATA, the cache folder, a download.
      cache_dir: pretrained models, compiled programs, downloads; None: the user's cache folder.
      out: where records go, `<bench>/<method>/seed<k>.json`.
      export_weights: where unlearned models go, as .safetensors, named like the records; None: nowhere.
      devices: how many; on a CPU, makes so many host devices, if JAX has not been used before. None: all there are.
      deterministic: the same bits from the same call on a GPU too, if JAX has not been used before; slower there.
      save_every: seconds between two checkpoints of what is training.
      attempts: at most so many at pretraining a seed that learns nothing; with 1 it is taken as it is.
      unlearn_seeds: so many unlearnings of each original, with random numbers of their own.
      against_retrain: train `retrain` too, or take it from the cache, and measure how far each method is from it; None:
        where that takes seconds.
      evaluate: "basic", or "full": also a linear probe, relearning and a support vector attack.
      eval_every: evaluate after every so many epochs of unlearning too, for `curves.evaluated` in the records; what
        is scored is the last model all the same. None: not on the way.
      keep_predictions: write what each model says of each image beside its record.
      tensorboard: where event files go, with curves as they come and the metrics; needs tensorboardX. None: nowhere.
      force: overwrite records of other settings and better ones.
      quiet: no progress.
      protocol: any field of `jaxunlearn.benchmarks.Protocol`, such as pretrain_epochs=1 or unlearn_lr=1e-4.

    Raises:
      UserError: something is wrong with the arguments, or results cannot be written; its message is one line.
      KeyboardInterrupt: the run was interrupted.
    """
    from jaxunlearn.devices.configuration import request_devices, restored, within_memory
    from jaxunlearn.progress import Reporter
    from jaxunlearn.runs.preparation import prepare
    from jaxunlearn.runs.request import Request, get_methods, make_protocol, parse_seeds, settled, with_retrain
    from jaxunlearn.runs.running import results

    numbers = {"save_every": save_every, "devices": devices or 1, "attempts": attempts, "unlearn_seeds": unlearn_seeds}
    numbers |= {"eval_every": 1 if eval_every is None else eval_every}
    for name, value in numbers.items():
        if not isinstance(value, int | float if name == "save_every" else int):
            raise UserError(f"{name} {value!r}: it must be a number")
    weights = _path("init_weights", init_weights)
    settings = _settings(set or {})
    fields = settings.pop("protocol", {}) | {name: _text(value) for name, value in protocol.items()}
    made = make_protocol(str(bench), {}, fields, weights)
    chosen = parse_seeds(str(seeds) if isinstance(seeds, int | str) else ",".join(map(str, seeds)))
    # The setting is one that a CPU reads once, when it is first used.
    with restored("jax_cpu_enable_async_dispatch"), within_memory():
        request_devices(devices, deterministic)
        request = Request(
            bench=bench,
            protocol=settled(made, fields),
            methods=get_methods(_methods(methods), settings, with_retrain(bench, against_retrain)),
            seeds=chosen,
            out=_path("out", out) or Path("runs"),
            cache_dir=_path("cache_dir", cache_dir) or default_cache(),
            data_dir=_path("data_dir", data_dir),
            init_weights=weights,
            export_weights=_path("export_weights", export_weights),
            devices=devices,
            deterministic=deterministic,
            save_every=save_every,
            attempts=attempts,
            unlearn_seeds=unlearn_seeds,
            evaluate=evaluate,
            eval_every=eval_every,
            keep_predictions=keep_predictions,
            tensorboard=_path("tensorboard", tensorboard),
            force=force,
        )
        prepared = prepare(request, Reporter(quiet))
        found = []
        for record, kept in results(prepared):
            found.append(record)
            if kept:
                warnings.warn(kept, stacklevel=2)

    def report(path: Path) -> list[str]:
        from jaxunlearn.report.writing import write_run

        return write_run(request, found, path)

    return Records(found, prepared.table_facts, report)


def _methods(given: Named | Iterable[Named] | None) -> list[Named] | None:
    if given is None:
        return None
    several = [given] if isinstance(given, str | Path) or callable(given) else list(given)
    return [m if callable(m) or not str(m).endswith(".py") else _path("methods", m) or m for m in several]


def _settings(given: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """As `parse_settings` makes them of what is typed."""
    settings: dict[str, dict[str, str]] = {}
    for name, value in given.items():
        owner, _, key = name.rpartition(".")
        if not (owner and key):
            raise UserError(f"set: '{name}': write METHOD.KEY, such as scrub.temperature")
        settings.setdefault(owner, {})[key] = _text(value)
    return settings


def _text(value: Any) -> str:
    """A setting as it would be typed; NumPy's values as Python's."""
    from jaxunlearn.registry import as_typed

    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, tuple | list):
        value = tuple(item.tolist() if hasattr(item, "tolist") else item for item in value)
    return as_typed(value)


def _path(name: str, given: str | Path | None) -> Path | None:
    try:
        return None if given is None else Path(given).expanduser()
    except (RuntimeError, TypeError) as error:  # of ~nobody, and of what is no path
        raise UserError(f"{name}: {one_line(error)}") from None
