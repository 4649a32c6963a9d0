"""PyTorch's side of the speed script: what it tries, what it takes, what it says."""

import dataclasses
import multiprocessing
import threading

import pytest

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.errors import UserError
from jaxunlearn.speed import PRETRAIN, QUANTITIES, SCRUB_FIRST

torch = pytest.importorskip("torch")
from jaxunlearn.torch_reference import harness  # noqa: E402
from jaxunlearn.torch_reference import speed as torch_speed  # noqa: E402
from jaxunlearn.torch_reference.speed import Fastest, Setting, Steps, settings  # noqa: E402

PROTOCOL = dataclasses.replace(get_benchmark("resnet20-digits-class0"), batch_size=2)


def test_what_is_tried():
    assert settings("cpu", "tf32", False) == [Setting("eager", "fp32"), Setting("compiled", "fp32")]
    forms = ("eager", "compiled", "CUDA graphs")
    assert settings("cuda", "tf32", False) == [Setting(form, "tf32") for form in forms]
    assert set(settings("cuda", "bf16", True)) == {Setting(f, p) for f in forms for p in ("tf32", "fp32", "bf16")}
    assert set(settings("cpu", "fp32", True)) == {Setting(f, p) for f in forms[:2] for p in ("fp32", "bf16")}


def test_the_fastest_setting_is_taken_and_one_that_fails_is_named(monkeypatch):
    took = {"eager": 3.0, "compiled": 1.0, "CUDA graphs": None}
    monkeypatch.setattr(torch_speed, "_seconds", lambda run: run())

    def make(setting):
        def run():
            if took[setting.form] is None:
                raise RuntimeError("Cannot find a working triton installation.\nIt is not there.")
            return took[setting.form]

        return run

    fastest = Fastest(make, settings("cuda", "tf32", False))
    fastest()
    assert fastest.setting == Setting("compiled", "tf32")
    ((setting, why),) = fastest.left_out.items()
    assert setting == "CUDA graphs, tf32" and "triton" in why and "\n" not in why
    took["eager"] = 0.0  # it is chosen once
    fastest()
    assert fastest.setting.form == "compiled"
    took |= dict.fromkeys(took)
    with pytest.raises(UserError, match="no form: RuntimeError: Cannot find"):
        Fastest(make, settings("cuda", "tf32", False))()


def test_its_side_answers_and_says_what_it_ran(monkeypatch):
    monkeypatch.setattr(torch_speed, "FORMS", {"eager": None, "broken": {"backend": "none of this name"}})
    here, there = multiprocessing.Pipe()
    arguments = (there, dataclasses.replace(PROTOCOL, precision="tf32"), 10, 1, "cpu", False)
    monkeypatch.setattr("jaxunlearn.speed.BURST_SECONDS", 0.0)
    threading.Thread(target=torch_speed.serve, args=arguments, daemon=True).start()
    assert here.recv() == {}
    for name in (PRETRAIN, SCRUB_FIRST):
        here.send(name)
        assert here.recv() > 0
    here.send(None)
    report = here.recv()
    assert report["settings"] == {name: {"form": "eager", "precision": "fp32"} for name in (PRETRAIN, SCRUB_FIRST)}
    assert set(report["left_out"]) == {f"{name}: broken, fp32" for name in (PRETRAIN, SCRUB_FIRST)}
    assert report["device"] == "cpu" and report["optimizer"] in torch_speed.OPTIMIZERS
    assert report["peak_memory_gib"] > 0


def test_without_a_gpu_for_pytorch_the_user_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        torch_speed.serve(None, PROTOCOL, 10, 1, "gpu", False)


def test_every_step_compiles_whole_and_its_teachers_too(monkeypatch):
    """By a compiler that only counts what is given to it."""
    seen = []

    def look(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch_speed, "FORMS", {"compiled": {"backend": look}})
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    steps = Steps(PROTOCOL, 10, 1, "cpu")
    graphs = {}
    for name in QUANTITIES:
        seen.clear()
        torch.compiler.reset()  # models share what is compiled
        steps.make(name, Setting("compiled", "fp32"), "foreach")()
        graphs[name] = len(seen)
    # bad_teacher's two teachers share theirs; its student sees both batches at once.
    twice = ("bad_teacher", "scrub", SCRUB_FIRST)
    assert graphs == {name: 2 if name in twice else 1 for name in QUANTITIES}


def test_a_compiled_teacher_answers_as_the_model_does():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    x = torch.randn(4, 3)
    plain = harness.frozen(model)
    assert not hasattr(plain, "compile_options")
    teacher = harness.frozen(harness.compiled(model, backend="eager"))
    assert teacher.compile_options == {"backend": "eager"} and not teacher[0].weight.requires_grad
    torch.testing.assert_close(teacher(x), plain(x))
