"""The speed script: what it counts, how its sides answer, what its users see."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from tiny import CLASSES, PROTOCOL

from jaxunlearn import speed
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.commands import speed as command
from jaxunlearn.commands.main import main
from jaxunlearn.devices import ceilings
from jaxunlearn.devices.configuration import programs_kept
from jaxunlearn.errors import UserError

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]


class Thread:
    """A side in a thread of this process: what `Side` is in a process of its own."""

    def __init__(self, serve, *arguments):
        self._connection, there = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(there, *arguments), daemon=True).start()
        self.about = self._connection.recv()

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


def test_a_burst_is_timed_by_the_step_after_one_that_is_not(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 10.0, 18.0, 19.0, 20.0, 24.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    calls = []
    here, there = multiprocessing.Pipe()
    for name in ("a", "a", None):
        here.send(name)
    speed.answer(there, {"steps": 2}, {"a": (2, lambda: calls.append(0))}, lambda: "done")
    # Warm-up took 0.5 s: four runs of two steps make a burst.
    assert [here.recv() for _ in range(4)] == [{"steps": 2}, 1.0, 0.5, "done"]
    assert len(calls) == 2 + 8 + 8


@pytest.mark.parametrize(("seeds", "quantities"), [(1, speed.QUANTITIES), (2, (speed.PRETRAIN, speed.SCRUB_FIRST))])
def test_every_quantity_is_measured_and_reported(seeds, quantities, monkeypatch, capsys):
    monkeypatch.setattr(speed, "QUANTITIES", quantities)
    monkeypatch.setattr(speed, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(speed, "epoch_steps", lambda protocol, num_classes: 1)
    monkeypatch.setattr(ceilings, "MATMUL_CPU", 64)
    monkeypatch.setattr(ceilings, "COPIED_CPU", 1 << 20)
    monkeypatch.setattr(command, "Side", Thread)
    monkeypatch.setattr(command, "PAIRS", 2)
    monkeypatch.setattr(command, "get_benchmark", lambda name: dataclasses.replace(PROTOCOL, batch_size=8))
    assert main(["speed", "--bench", "tiny", "--seeds", str(seeds), "--devices", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["quantities"]) == set(quantities)
    assert set(record["compile_s"]) == set(record["warm_compile_s"]) == set(quantities)
    assert min(record["compile_s"].values()) > 0 and min(record["warm_compile_s"].values()) > 0
    for row in record["quantities"].values():
        assert row["ours"] > 0 and len(row["ours_bursts"]) == 2
        assert ("ratio" in row) == (seeds > 1)
    assert record["against"] == (None if seeds == 1 else "one seed")
    assert record["environment"]["device_count"] == 1 and record["peak_memory_gib"] > 0
    assert record["precision"] == "fp32" and record["matmul_gflops"] > 0 and record["copy_gb_s"] > 0
    command.print_record(record)
    shown = capsys.readouterr().out
    assert "scrub, first epochs" in shown and "FLOP utilisation" in shown and "warm s" in shown
    assert ("ours, 2 seeds in all" in shown and "one seed alone" in shown) == (seeds == 2)


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
        command.Side(speed.serve, get_benchmark("resnet20-digits-class0"), 10, None, 1, 1000, None)


def canned(about, **more):
    """A stand-in for `Side` whose sides say `about`, then that a step takes a second; it keeps what started them."""

    made = []

    class Canned:
        def __init__(self, serve, *arguments):
            self.about = about
            made.append((serve, arguments, os.environ.get(command.PREALLOCATE)))

        def ask(self, name):
            rates = {"multiply_adds": 1, "matmul_gflops": 1.0}
            return 1.0 if name else rates | more

    Canned.made = made
    return Canned


GPU = {"precision": "tf32", "platform": "gpu", "steps": 100}


@pytest.mark.parametrize(("asked", "told"), [([], None), (["--precision", "fp32"], "fp32")])
def test_the_first_side_decides_the_precision_and_the_other_is_told(asked, told, monkeypatch, capsys):
    side = canned(GPU)
    monkeypatch.setattr(command, "Side", side)
    assert main(["speed", "--bench", "resnet20-digits-class0", "--seeds", "3", "--json", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "tf32"
    (_, ours, _), (_, one, _) = side.made
    assert ours[2:4] == (told, 3) and one[2:4] == ("tf32", 1)
    assert ours[-1] != one[-1]  # where they keep their programs


def test_the_table_says_how_pytorch_ran_and_what_failed(monkeypatch, capsys):
    pytest.importorskip("torch")
    times = dict.fromkeys(speed.QUANTITIES, 1.5)
    ours = {"compile_s": times, "warm_compile_s": times, "copy_gb_s": 3.0, "peak_memory_gib": 1.0}
    ours["environment"] = {"device_count": 1, "device_kind": "a GPU"}
    theirs = {
        "settings": {name: {"form": "compiled", "precision": "bf16"} for name in speed.QUANTITIES},
        "left_out": {"scrub: CUDA graphs, bf16": "RuntimeError: [no] memory"},
    }
    monkeypatch.setattr(command, "Side", canned(GPU, **ours, **theirs))
    assert main(["speed", "--bench", "resnet20-digits-class0", "--against", "torch-best"]) == 0
    shown = capsys.readouterr().out
    assert "torch-best" in shown and shown.count("compiled, bf16") == len(times) and "tf32, 1 a GPU" in shown
    assert "left out, scrub: CUDA graphs, bf16: RuntimeError: [no] memory" in shown


@pytest.mark.parametrize("against", ["torch", "torch-best"])
def test_pytorch_is_told_what_jax_runs_on(against, monkeypatch, capsys):
    torch_speed = pytest.importorskip("jaxunlearn.torch_reference.speed")
    side = canned(GPU)
    monkeypatch.setattr(command, "Side", side)
    assert main(["speed", "--bench", "resnet20-digits-class0", "--against", against, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantities"]["scrub"]["ratio"] == 1.0
    serve, arguments, _ = side.made[1]
    assert serve is torch_speed.serve and arguments[0].precision == "tf32"
    assert arguments[2:] == (100, "gpu", against == "torch-best")


@pytest.mark.parametrize(
    ("variables", "seeds", "seen"),
    [
        ({}, 1, None),
        ({}, 2, "false"),
        ({command.PREALLOCATE: "true"}, 2, "true"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}, 2, None),
    ],
)
def test_two_sides_share_the_memory_of_a_device(variables, seeds, seen, monkeypatch):
    for name in (command.PREALLOCATE, "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before, side = dict(os.environ), canned(GPU)
    monkeypatch.setattr(command, "Side", side)
    assert main(["speed", "--bench", "resnet20-digits-class0", "--seeds", str(seeds), "--json"]) == 0
    assert [environment for *_, environment in side.made] == [seen] * seeds
    assert dict(os.environ) == before


def test_the_command_itself_does_not_use_a_device():
    script = """
import sys
sys.path.insert(0, "tests")
from test_speed import GPU, canned, command, main
command.Side = canned(GPU)
assert main(["speed", "--bench", "resnet20-digits-class0", "--seeds", "2", "--json"]) == 0
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)


def test_compiling_again_finds_the_programs_whatever_cache_there_is(tmp_path):
    workload = speed.Workload(dataclasses.replace(PROTOCOL, batch_size=8), CLASSES, 1, 1, steps=2)
    burst = speed.Burst(workload, "retain_finetune", tmp_path / "own")
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
    hits = ("cache_hits", "cache_misses")
    with programs_kept(tmp_path / "users"):
        burst()
        cold, events[:] = [events.count(name) for name in hits], []
        assert list((tmp_path / "own").rglob("*")) and not (tmp_path / "users").exists()
        again = burst.compile_again()
    warm = [events.count(name) for name in hits]
    assert cold[0] == 0 and cold[1] > 0 and warm[0] > 0 and again > 0


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("tf32", "float32"), ("bf16", "bfloat16")])
def test_the_ceiling_is_that_of_the_platform_and_the_precision(platform, precision, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(ceilings, "MATMUL", 128)
    monkeypatch.setattr(ceilings, "MATMUL_CPU", 32)
    seen = []

    def fastest(call, argument):
        (product,) = jax.make_jaxpr(call)(argument).eqns[0].params["jaxpr"].eqns
        seen.append((argument.shape[0], argument.dtype.name, str(product.params["precision"])))
        return 2.0

    monkeypatch.setattr(ceilings, "_fastest", fastest)
    size = 32 if platform == "cpu" else 128
    assert ceilings.matmul_rate(precision) == size**3
    ((found, kind, asked),) = seen
    assert (found, kind) == (size, dtype)
    assert ("HIGHEST" in asked) == (platform == "gpu" and precision == "fp32")


def test_a_rate_is_of_the_fastest_round(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 2.0, 3.0, 3.5, 4.0])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(ceilings, "SECONDS", 3.0)
    assert ceilings._fastest(lambda x: x, jnp.zeros(())) == (0.5 if jax.default_backend() == "cpu" else 0.05)
