"""The check of a GPU: its lists, its schedule, and all of it at tiny size on a CPU."""

import errno
import fcntl
import importlib.util
import json
import os
import sys
import threading
import time

import jax
import pytest

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.commands.gpu_check import MOST_ROWS, print_table, summary
from jaxunlearn.commands.main import main
from jaxunlearn.errors import UserError
from jaxunlearn.gpu_check import agreement, schedule
from jaxunlearn.gpu_check.arms import DEFAULT, TINY, Arm, parse
from jaxunlearn.gpu_check.kernels import summed

pytestmark = pytest.mark.slow


def test_a_list_of_arms():
    first, second = parse(
        "# all\n\n2.5 A=1 B='x y' train vgg tf32 8 vmap # which form\n9 torch resnet bf16 eager graphs"
    )
    assert first == Arm(("train", "vgg", "tf32", "8", "vmap"), 2.5, {"A": "1", "B": "x y"}, "which form")
    assert first.name == "A=1 B=x y train vgg tf32 8 vmap"
    assert (second.limit, second.environment, second.decides) == (9, {}, "")
    for text in (DEFAULT, TINY):
        arms = parse(text)
        assert {arm.words[0] for arm in arms} == {"ceilings", "agree", "train", "torch", "digits"}
        assert len({arm.name for arm in arms}) == len(arms) < MOST_ROWS and all(arm.decides for arm in arms)


@pytest.mark.parametrize(
    "line",
    [
        "ceilings",
        "0 ceilings",
        "nan ceilings",
        "9",
        "9 A=1",
        "9 'ceilings",
        "9 ceilings now",
        "9 agree lenet",
        "9 train resnet tf32 0 64",
        "9 train resnet tf32 8 64",
        "9 train resnet tf32 8 0-64",
        "9 torch resnet tf32",
        "9 torch resnet tf32 eager fast",
    ],
)
def test_a_line_that_is_no_arm_is_named(line):
    with pytest.raises(UserError, match="no arm: "):
        parse(f"9 digits\n{line}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--seconds 0", "--seconds 0.0: it must be more than 0"),
        ("--arms none", "--arms none: No such file"),
        ("--arms empty", "no arm in the list"),
        ("--out no/where", "--out no/where: No such file"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    assert main(["gpu-check", *arguments.split()]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def run(scripts, monkeypatch, deadline=60.0, limit=60.0, workers=3):
    """What is told of arms that run Python's code, {its index: result}, and the seconds of it all."""
    monkeypatch.setattr(schedule, "COMMAND", (sys.executable, "-c"))
    monkeypatch.setattr(schedule, "WORKERS", workers)
    told, start = [], time.monotonic()
    schedule.run_arms([Arm((script,), limit, {"SAID": "so"}, "") for script in scripts], deadline, told.append)
    return {scripts.index(result["arm"].partition(" ")[2]): result for result in told}, time.monotonic() - start


def test_an_arms_lines_are_told_and_how_it_failed(monkeypatch):
    scripts = [
        "import os; print('measuring'); print('noise'); print('{\"said\": \"%s\"}' % os.environ['SAID'])",
        "import sys; sys.exit('first\\nlast words')",
        "import os; os.abort()",
        "import os, sys; sys.stderr.write('F1126 x.cc] Check failed\\n @ main\\n'); sys.stderr.flush(); os.abort()",
    ]
    told, _ = run(scripts, monkeypatch)
    assert told[0]["said"] == "so" and told[0]["seconds"] >= 0
    assert told[1]["error"] == "status 1: last words" and told[2]["error"].startswith("status -6")
    assert told[3]["error"] == "status -6: F1126 x.cc] Check failed"


def test_an_arm_has_its_limit_from_its_turn_on(monkeypatch):
    scripts = [
        "import time; time.sleep(1.5); print('measuring', flush=True)",
        "import time; print('measuring', flush=True); time.sleep(60)",
        # What it has started ends with it, else the pipe would stay open.
        "import subprocess; print('measuring', flush=True); subprocess.run(['sleep', '60'])",
    ]
    told, seconds = run(scripts, monkeypatch, limit=1.0)
    assert 0 not in told and seconds < 30
    assert told[1]["error"] == told[2]["error"] == "it took more than 1 s"


def test_what_does_not_fit_before_the_deadline_is_named(monkeypatch):
    monkeypatch.setattr(schedule, "LEAST", 0.5)
    scripts = ["import time; time.sleep(60)", "print('{}')"]
    told, seconds = run(scripts, monkeypatch, deadline=1.0, workers=1)
    assert told[0]["error"] == "the deadline came" and "skipped" in told[1] and seconds < 30


def test_an_interrupt_ends_every_arm(monkeypatch):
    def interrupted(result):
        raise KeyboardInterrupt

    thread = schedule.threading.Thread
    joined = []

    class Interrupted(thread):
        def join(self, timeout=None):
            if not joined:
                joined.append(time.sleep(0.5))
                raise KeyboardInterrupt

    monkeypatch.setattr(schedule.threading, "Thread", Interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(["import time; time.sleep(60)", "import time; time.sleep(61)"], monkeypatch)
    assert time.monotonic() - start < 30


def test_one_arm_has_the_turn(monkeypatch, tmp_path, capsys):
    measuring = pytest.importorskip("jaxunlearn.gpu_check.measuring")
    monkeypatch.setenv(schedule.TURN, str(tmp_path / "turn"))
    first, second = measuring.Turn(), measuring.Turn()
    first.take()
    first.take()
    waiting = threading.Thread(target=second.take)
    waiting.start()
    time.sleep(0.3)
    assert capsys.readouterr().out == "measuring\n"
    first._lock.release()
    waiting.join()
    assert capsys.readouterr().out == "measuring\n" and second.waited_s >= 0.2


def test_a_turn_needs_locks(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    measuring = pytest.importorskip("jaxunlearn.gpu_check.measuring")
    monkeypatch.setenv(schedule.TURN, str(tmp_path / "turn"))
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"without locks: choose another TMPDIR$"):
        measuring.Turn().take()


def test_the_table_is_short_and_says_what_is_decided(capsys):
    decides = {f"arm {i}": f"question {i}" for i in range(70)}
    results = [{"arm": name, "seconds": 1.0, "images_per_s": 5, "loss": 1.0} for name in reversed(decides)]
    print_table(results, decides)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and "20 more" in lines[-1]
    row = next(line for line in lines if "arm 0 " in line)
    assert "images_per_s 5" in row and "question 0" in row and "loss" not in row


def test_what_is_shown_of_a_result():
    found = {"loss": 1e-7, "logits": 2e-6, "worst_layer": 3e-6}
    assert (
        summary({"ok": True, "highest": found, "default": found}) == "as it should be: highest 3.0e-06; default 3.0e-06"
    )
    assert summary({"ok": False, "highest": found, "default": found}).startswith("OUT: ")
    assert summary({"error": "status 1: no"}) == "error: status 1: no"


@pytest.mark.slow
@pytest.mark.cpu
def test_all_of_it_at_tiny_size(tmp_path, capsys, quick_compiler):
    out = tmp_path / "lines"
    assert main(["gpu-check", "--tiny", "--out", str(out)]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    by_kind = {arm.words[0]: arm.name for arm in parse(TINY)}
    assert {result["arm"] for result in results} == {arm.name for arm in parse(TINY)}
    found = {kind: next(r for r in results if r["arm"] == name) for kind, name in by_kind.items()}
    assert found["agree"]["ok"] and found["digits"]["warm_same_bits"] and found["ceilings"]["copy_gb_s"] > 0
    assert found["digits"]["programs"] > found["digits"]["compiled_again"]
    assert found["train"]["images_per_s"] > 0
    with_torch = importlib.util.find_spec("torch") is not None
    assert found["torch"].get("form") == "eager" if with_torch else "not installed" in found["torch"]["skipped"]
    shown = capsys.readouterr().out
    assert shown.startswith("{") and "digits" in shown.splitlines()[-2]


def test_kernels_are_counted_and_summed_up_by_name():
    events = [("gemm_12", 1e6, 5e5), ("gemm.3", 1.2e6, 6e5), ("add", 3e6, 1e6)]  # 1.0-1.8, 3-4 of 1-4 ms
    found = summed(events[::-1], steps=2)
    assert found == {"kernels": 1.5, "busy": 0.6, "longest": {"gemm": 0.55, "add": 0.5}}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("broken", [None, "y", "kernel"])
def test_a_layer_that_is_off_is_seen(broken, monkeypatch):
    conv2d, programs = agreement.conv2d, []

    def off(x, kernel, stride, groups):
        """As it is in the first program, the CPU's; in others one layer is off by a thousandth."""
        if len(programs) < 2 or kernel.shape[-2:] != (16, 32) or broken is None:
            return conv2d(x, kernel, stride, groups)
        factor = 1.001 if broken == "y" else 1 + 1e-3 * (kernel - jax.lax.stop_gradient(kernel)).sum()
        return factor * conv2d(x, kernel, stride, groups)

    monkeypatch.setattr(agreement, "conv2d", off)
    protocol = get_benchmark("resnet20-digits-class0")
    found = agreement.agreement(protocol, 10, 2, lambda: programs.extend([1, 2]))
    worst = [found[precision].pop("worst_layer") for precision in agreement.WITHIN]
    assert found["ok"] == (broken is None) and all(far > 1e-4 if broken else far == 0 for far in worst)
    assert all(value == 0 for precision in agreement.WITHIN for value in found[precision].values())
