"""The speed script: what it counts, how its sides answer, what its users see."""

import dataclasses
import json
import multiprocessing
import threading

import pytest
from tiny import PROTOCOL

from jaxunlearn import speed
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.commands import speed as command
from jaxunlearn.commands.main import main
from jaxunlearn.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_models")


class Thread:
    """A side in a thread of this process: what `Side` is in a process of its own."""

    def __init__(self, serve, *arguments):
        self._connection, there = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(there, *arguments), daemon=True).start()
        self._connection.recv()

    def ask(self, name):
        self._connection.send(name)
        return self._connection.recv()


@pytest.mark.parametrize(
    ("bench", "change", "millions"),
    [
        ("resnet20-cifar10-class0", {}, 41),
        ("vgg16bn-cifar100-class0", {}, 313),
        ("mobilenetv2-fmnist-class0", {}, 88.0),
        ("mobilenetv2-fmnist-class0", {"mobilenet_stride": 2}, 24.5),
    ],
)
def test_multiply_adds_of_an_image(bench, change, millions):
    protocol = dataclasses.replace(get_benchmark(bench), **change)
    count = speed.multiply_adds(protocol, 100 if "vgg" in bench else 10)
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_burst_is_timed_by_the_step_after_two_that_are_not(monkeypatch):
    clock = iter([0.0, 0.5, 10.0, 18.0, 20.0, 24.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    calls = []
    here, there = multiprocessing.Pipe()
    for name in ("a", "a", None):
        here.send(name)
    speed.answer(there, {"a": (2, lambda: calls.append(0))}, lambda: "done")
    # Warm-up took 0.5 s: four runs of two steps make a burst.
    assert [here.recv() for _ in range(4)] == ["ready", 1.0, 0.5, "done"]
    assert len(calls) == 2 + 4 + 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_quantity_is_measured_and_reported(seeds, monkeypatch, capsys):
    monkeypatch.setattr(speed, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(speed, "epoch_steps", lambda protocol, num_classes: 1)
    monkeypatch.setattr(speed, "MATMUL", 64)
    monkeypatch.setattr(command, "Side", Thread)
    monkeypatch.setattr(command, "PAIRS", 2)
    monkeypatch.setattr(command, "get_benchmark", lambda name: dataclasses.replace(PROTOCOL, batch_size=8))
    assert main(["speed", "--bench", "tiny", "--seeds", str(seeds), "--devices", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["quantities"]) == set(record["compile_s"]) == set(speed.QUANTITIES)
    for row in record["quantities"].values():
        assert row["ours"] > 0 and len(row["ours_bursts"]) == 2
        assert ("ratio" in row) == (seeds > 1)
    assert record["against"] == (None if seeds == 1 else "one seed")
    assert record["environment"]["device_count"] == 1 and record["peak_memory_gib"] > 0
    command.print_record(record)
    shown = capsys.readouterr().out
    assert "scrub, first epochs" in shown and "FLOP utilisation" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--bench resnet20-cifar10", "did you mean 'resnet20-cifar10-class0'"),
        ("--bench resnet20-cifar10-class0 --seeds 0", "--seeds 0: at least one"),
        ("--bench resnet20-cifar10-class0 --against jax", "invalid choice: 'jax'"),
        ("--seeds 2", "required: --bench"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, said, capsys):
    assert main(["speed", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_what_is_wrong_in_a_side_is_said_here():
    with pytest.raises(UserError, match="--devices 1000: this machine has"):
        command.Side(speed.serve, get_benchmark("resnet20-digits-class0"), 10, 1, 1000)
