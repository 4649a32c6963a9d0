"""Event files for TensorBoard, a folder a model. What is in them already is not written again."""

import struct
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxunlearn.errors import UserError, one_line, printable
from jaxunlearn.evaluation.metrics import METRICS

HPARAMS = "_hparams_/session_start_info"  # the tag that TensorBoard's plugin looks for


def check_tensorboard() -> None:
    """Raises UserError where what writes event files is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError(
            "--tensorboard needs tensorboardX: pip install tensorboardX (in a checkout: '.[tensorboard]')"
        ) from None


class EventFiles:
    """The event files below a folder. What cannot be written is warned of once, and ends nothing."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[Path, tuple[Any, dict[tuple[str, int], float]]] = {}  # writers, and what is written, by name
        self._failed = self._warned = False

    def add(self, name: Path, step: int, values: Mapping[str, float | None]) -> None:
        """Adds what is known of the values, by tag, to a model's."""
        from tensorboardX.proto.summary_pb2 import Summary

        known = {tag: value for tag, value in values.items() if value is not None}
        made = {tag: Summary(value=[Summary.Value(tag=tag, simple_value=value)]) for tag, value in known.items()}
        self._write(name, step, made)

    def finish(self, name: Path, record: Mapping[str, Any], phase: str) -> None:
        """Adds all that a model's record knows, of which its curve as that of `phase`, and closes its file."""
        from tensorboardX.summary import hparams

        curves, last = record["curves"], record["protocol"]["unlearn_epochs"] if record["unlearn_steps"] else 0
        self.add_curve(name, phase, curves["unlearn"] or {})
        if evaluated := curves["evaluated"]:
            for number, epoch in enumerate(evaluated["epoch"]):
                here = {f"evaluated/{key}": values[number] for key, values in evaluated.items() if key != "epoch"}
                self.add(name, epoch, here)
        final = {f"final/{key}": record[key] for key in METRICS if record[key] is not None}
        self._compare(name, {(tag, last): value for tag, value in final.items()})
        self.add(name, last, final)
        settings = {key: record[key] for key in ("bench", "method", "seed", "unlearn_seed")}
        settings |= {f"protocol.{key}": value for key, value in record["protocol"].items()} | record["hyperparameters"]
        plain = {key: x if isinstance(x, bool | int | float | str) else str(x) for key, x in settings.items()}
        experiment, start, end = hparams(plain, final)
        self._write(name, 0, {"_hparams_/experiment": experiment, HPARAMS: start, "_hparams_/session_end_info": end})
        self.close_one(name)

    def add_curve(self, name: Path, phase: str, curve: Mapping[str, list[float | None]]) -> None:
        """Adds a metric's mean over each epoch, from epoch 1."""
        for key, values in curve.items():
            for number, value in enumerate(values):
                self.add(name, number + 1, {f"{phase}/{key}": value})

    def close_one(self, name: Path) -> None:
        """Closes a model's file, if it is open."""
        writer, _ = self._open.pop(name, (None, None))
        if writer:
            with suppress(OSError):  # all was flushed as it came, or was warned of
                writer.close()

    def close(self) -> None:
        """Closes all files."""
        for name in list(self._open):
            self.close_one(name)

    def _compare(self, name: Path, values: Mapping[tuple[str, int], float]) -> None:
        """Warns once where another run has left other values: nothing that is there is replaced."""
        _, written = self._open.get(name, (None, {}))
        if not self._warned and any(abs(written.get(key, value) - value) > 1e-6 for key, value in values.items()):
            self._warned = True
            line = f"{self._folder / name} has the curves of another run, which stay: name another --tensorboard folder"
            warnings.warn(printable(line), stacklevel=2)

    def _write(self, name: Path, step: int, summaries: Mapping[str, Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        folder = self._folder / name
        try:
            if name not in self._open:
                self._open[name] = None, dict(_written(folder))
            writer, written = self._open[name]
            new = {tag: one for tag, one in summaries.items() if (tag, step) not in written}
            if self._failed or not new:
                return
            if writer is None:
                folder.mkdir(parents=True, exist_ok=True)
                number = len(list(folder.iterdir()))  # or two of one second would have one name
                writer = EventsWriter(str(folder / "events"), f".{number}")
            for tag, one in new.items():
                writer.write_event(Event(wall_time=time.time(), step=step, summary=one))
                written[tag, step] = one.value[0].simple_value
            writer.flush()
            self._open[name] = writer, written
        except OSError as error:
            self._failed = True
            self.close()  # the run needs the files that they hold open
            warnings.warn(f"event files are not written any more ({one_line(error)}): the run goes on", stacklevel=2)


def _written(folder: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """(tag, step) and value of all that a folder's event files have; what a process that died had begun is nothing."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.glob("*tfevents*"):
        content, place = path.read_bytes(), 0
        while len(content) >= place + 12:
            (length,) = struct.unpack_from("<Q", content, place)  # then its checksum, the event and that one's
            if len(content) < place + 16 + length:
                break
            try:
                event = Event.FromString(content[place + 12 : place + 12 + length])
            except DecodeError:
                break
            yield from (((value.tag, event.step), value.simple_value) for value in event.summary.value)
            place += 16 + length
