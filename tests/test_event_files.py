"""Event files for TensorBoard, read back: what they have, each value once."""

import json
import struct
import sys
from collections import Counter
from contextlib import closing

import pytest
from example_record import example_record
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from test_runs import numbers, request_of, results, stop_after, tiny_bench

from jaxunlearn.errors import UserError
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.runs.event_files import HPARAMS, EventFiles, check_tensorboard

__all__ = ["tiny_bench"]  # a fixture
RECORD = example_record()
NAME = "bench/method/seed1"


def events(folder):
    """Of all files of a folder (tag, step, value's message)."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


def scalars(folder):
    return {(tag, step): value.simple_value for tag, step, value in events(folder) if "_hparams_" not in tag}


def test_values_come_as_they_are_told_and_unknown_ones_not(tmp_path):
    with closing(EventFiles(tmp_path)) as files:
        files.add(NAME, 1, {"unlearn/loss": 0.5, "unlearn/accuracy": None})
        assert scalars(tmp_path / NAME) == {("unlearn/loss", 1): 0.5}  # before anything is closed
        files.add(NAME, 2, {"unlearn/loss": 0.25})
    assert scalars(tmp_path / NAME) == {("unlearn/loss", 1): 0.5, ("unlearn/loss", 2): 0.25}


def test_what_another_process_wrote_is_not_written_twice_nor_lost(tmp_path):
    with closing(EventFiles(tmp_path)) as files:
        files.add(NAME, 1, {"unlearn/loss": 0.5})
    (file,) = (tmp_path / NAME).iterdir()
    file.write_bytes(file.read_bytes() + b"\x20\0\0\0\0\0\0\0abcd")  # it died within a write
    with closing(EventFiles(tmp_path)) as files:
        files.add_curve(NAME, "unlearn", {"loss": [0.5, 0.25]})
    assert len(list((tmp_path / NAME).iterdir())) == 2
    file.write_bytes(file.read_bytes()[:-12])
    assert [(tag, step) for tag, step, _ in events(tmp_path / NAME)] == [("unlearn/loss", 1), ("unlearn/loss", 2)]


def test_a_record_gives_its_metrics_and_settings(tmp_path):
    files = EventFiles(tmp_path)
    files.finish(NAME, RECORD, "unlearn")
    files.finish(NAME, RECORD, "unlearn")
    assert max(Counter((tag, step) for tag, step, _ in events(tmp_path / NAME)).values()) == 1
    final = {tag: value for (tag, _), value in scalars(tmp_path / NAME).items() if tag.startswith("final/")}
    assert final == pytest.approx({f"final/{name}": RECORD[name] for name in METRICS if RECORD[name] is not None})
    (start,) = (value for tag, _, value in events(tmp_path / NAME) if tag == HPARAMS)
    told = HParamsPluginData.FromString(start.metadata.plugin_data.content).session_start_info.hparams
    assert told["method"].string_value == RECORD["method"] and told["seed"].number_value == RECORD["seed"]
    assert told["protocol.batch_size"].number_value == RECORD["protocol"]["batch_size"]


def test_a_full_disk_is_warned_of_once_and_ends_nothing(tmp_path):
    (tmp_path / "bench").write_text("no folder")
    files = EventFiles(tmp_path)
    with pytest.warns(UserWarning, match=r"^event files are not written any more \(.*\): the run goes on$"):
        files.add(NAME, 1, {"unlearn/loss": 0.5})
    files.add(NAME, 2, {"unlearn/loss": 0.5})
    files.finish(NAME, RECORD, "unlearn")


def test_where_the_library_is_missing_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"^--tensorboard needs tensorboardX: pip install tensorboardX [^\n]*$"):
        check_tensorboard()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_a_run_that_was_stopped_has_every_value_once(tmp_path, monkeypatch):
    asked = {"seeds": (3, 4), "eval_every": 1, "tensorboard": tmp_path / "events", "save_every": 1000.0}
    stop_after(monkeypatch, 7)  # within pretraining: three epochs of five steps
    with pytest.raises(KeyboardInterrupt):
        results(request_of(tmp_path, **asked))
    stop_after(monkeypatch, None)
    records = results(request_of(tmp_path, **asked))
    assert list(map(numbers, results(request_of(tmp_path, **asked)))) == list(map(numbers, records))
    for record in json.loads(json.dumps(records)):
        bench, seed = tmp_path / "events" / record["bench"], f"seed{record['seed']}"
        own, original = bench / "retain_finetune" / seed, bench / "pretrained" / seed
        assert max(Counter((tag, step) for tag, step, _ in [*events(own)]).values()) == 1
        losses = {("pretrain/loss", epoch + 1): x for epoch, x in enumerate(record["curves"]["pretrain"]["loss"])}
        assert losses.items() <= {key: pytest.approx(x) for key, x in scalars(original).items()}.items()
        steps = {step for tag, step in scalars(own) if tag == "evaluated/retain_acc"}
        assert steps == {0, 1, 2} and scalars(own)["final/retain_acc", 2] == pytest.approx(record["retain_acc"])


def test_another_runs_values_stay_and_are_told_of_once(tmp_path):
    with closing(EventFiles(tmp_path)) as files:
        files.finish(NAME, RECORD, "unlearn")
    kept = scalars(tmp_path / NAME)
    with closing(EventFiles(tmp_path)) as files:
        files.finish(NAME, RECORD, "unlearn")  # the same run says nothing
        with pytest.warns(UserWarning, match=r"has the curves of another run, which stay: name another --tensorboard"):
            files.finish(NAME, RECORD | {"retain_acc": 0.5}, "unlearn")
        files.finish(NAME, RECORD | {"retain_acc": 0.4}, "unlearn")
    assert scalars(tmp_path / NAME) == kept
