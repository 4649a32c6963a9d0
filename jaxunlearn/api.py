"""The benchmark from Python: `jaxunlearn.run`. Nothing here loads JAX before a run does."""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxunlearn.files import default_cache

if TYPE_CHECKING:
    import pandas


class Records(list[dict[str, Any]]):
    """Result records, one a method and seed, in the order in which they were made: plain data, as in the files."""

    def __init__(self, records: Iterable[dict[str, Any]], facts: Mapping[str, Any]):
        super().__init__(records)
        self._facts = facts

    def table(self) -> str:
        """The table that the command prints: methods ranked, mean and deviation over seeds, the published rows."""
        from jaxunlearn.results.tables import print_results

        text = io.StringIO()
        print_results(self, **self._facts, file=text)
        return text.getvalue()

    def frame(self) -> "pandas.DataFrame":
        """A row a record, a column a value, such as `retain_acc` and `before.retain_acc`. Needs pandas."""
        import pandas

        return pandas.json_normalize(self)


def run(
    bench: str,
    methods: Sequence[str | Path | Callable[..., Any]] | None = None,
    seeds: Iterable[int] | str = (42,),
    *,
    set: Mapping[str, Any] | None = None,
    init_weights: str | Path | None = None,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    out: str | Path = "runs",
    export_weights: str | Path | None = None,
    devices: int | None = None,
    save_every: float = 120.0,
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
      methods: names, rule files, or rules themselves: functions as `loss_rule` makes them, classes with an
        `unlearn_step`. None: the four baselines. Nobody can say what a function depends on, so an interrupted
        unlearning by one starts again at its first step.
      seeds: several train together; "0-7" is understood too.
      set: hyperparameters, such as {"scrub.temperature": 2}.
      init_weights: a file of a PyTorch state_dict to start from, in place of pretraining.
      data_dir: where the images are; else $JAXUNLEARN_DATA, the cache folder, a download.
      cache_dir: pretrained models, compiled programs, downloads; None: the user's cache folder.
      out: where records go, `<bench>/<method>/seed<k>.json`.
      export_weights: where unlearned models go, as .safetensors, named like the records; None: nowhere.
      devices: how many; on a CPU, makes so many host devices, if JAX has not been used before. None: all there are.
      save_every: seconds between two checkpoints of what is training.
      force: overwrite records of other settings and better ones.
      quiet: no progress on a terminal.
      protocol: any field of `jaxunlearn.benchmarks.Protocol`, such as pretrain_epochs=1 or unlearn_lr=1e-4.

    Raises:
      UserError: something is wrong with the arguments, or results cannot be written; its message is one line.
      KeyboardInterrupt: the run was interrupted.
    """
    from jaxunlearn.devices.configuration import request_devices
    from jaxunlearn.progress import Reporter
    from jaxunlearn.runs.preparation import prepare
    from jaxunlearn.runs.request import Request, get_methods, make_protocol, parse_seeds, parse_settings, settled
    from jaxunlearn.runs.running import results

    def path(given: str | Path | None) -> Path | None:
        return None if given is None else Path(given).expanduser()

    chosen = parse_seeds(seeds if isinstance(seeds, str) else ",".join(map(str, seeds)))
    weights = path(init_weights)
    settings = parse_settings([f"{name}={_text(value)}" for name, value in (set or {}).items()])
    fields = settings.pop("protocol", {}) | {name: _text(value) for name, value in protocol.items()}
    made = make_protocol(bench, {}, fields, weights)
    request_devices(devices)
    request = Request(
        bench=bench,
        protocol=settled(made, fields),
        methods=get_methods(methods, settings),
        seeds=chosen,
        out=path(out) or Path(),
        cache_dir=path(cache_dir) or default_cache(),
        data_dir=path(data_dir),
        init_weights=weights,
        export_weights=path(export_weights),
        devices=devices,
        save_every=save_every,
        force=force,
    )
    prepared = prepare(request, Reporter(quiet))
    found = []
    for record, kept in results(prepared):
        found.append(record)
        if kept:
            warnings.warn(kept, stacklevel=2)
    return Records(found, prepared.table_facts)


def _text(value: Any) -> str:
    """A setting as it would be typed; numpy's scalars as Python's."""
    return value if isinstance(value, str) else repr(getattr(value, "item", lambda: value)())
