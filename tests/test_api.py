"""`jaxunlearn.run`, as its users meet it: what it returns, what it leaves of their process, what it refuses."""

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas
import pytest
from jobs import share_kernels
from test_bench import BENCH, TINY, bench

import jaxunlearn
from jaxunlearn import UserError, benchmarks
from jaxunlearn.benchmarks import Protocol
from jaxunlearn.commands.bench import add_arguments
from jaxunlearn.commands.parser import Parser
from jaxunlearn.devices import configuration
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.methods.rule import cross_entropy, loss_rule
from jaxunlearn.runs import preparation
from jaxunlearn.torch_style import UnlearningMethod

pytestmark = pytest.mark.usefixtures("tiny_models")
__all__ = ["bench"]  # a fixture
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
    "jax_cpu_enable_async_dispatch",
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`jaxunlearn.run` of the tiny benchmark in an empty folder."""
    monkeypatch.setitem(benchmarks.BENCHMARKS, BENCH, TINY)
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(methods=("retain_finetune",), seeds=(42,), **options):
        return jaxunlearn.run(BENCH, methods, seeds, **{"cache_dir": "cache", "devices": 1} | options)

    return run


@loss_rule
def my_rule(student, retain, forget, *, weight: float = 1.0):
    return weight * cross_entropy(student(retain.images), retain.labels)


class Mine(UnlearningMethod):
    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def unlearn_step(self, model, retain_batch, forget_batch, optimizer, step, epoch):
        images, labels = retain_batch
        return {"loss": optimizer.step(lambda: self.weight * cross_entropy(model(images), labels))}


def numbers(record):
    return record["method"], record["seed"], [record[name] for name in METRICS], record["before"]


def test_it_does_what_the_command_does(run, bench, tmp_path):
    status, out, _ = bench("--bench", BENCH, "--method", "scrub", "--seeds", "1,3", "--devices", "1", "--json")
    records = run(["scrub"], seeds=[1, 3], out="other", cache_dir="other-cache")
    assert status == 0 and list(map(numbers, records)) == [numbers(json.loads(line)) for line in out.splitlines()]
    assert json.loads((tmp_path / "other" / BENCH / "scrub" / "seed3.json").read_text()) == json.loads(
        json.dumps(records[1])
    )
    _, table, _ = bench("--bench", BENCH, "--method", "scrub", "--seeds", "1,3", "--devices", "1")
    cells, same = ([line.split()[:10] for line in text.splitlines()] for text in (table, records.table()))  # no seconds
    assert cells == same and [row[1] for row in cells if row and row[0] in ("1", "ref")] == ["pretrained", "scrub"]


def test_records_are_plain_data_and_a_frame(run):
    records = run(seeds=range(2), pretrain_epochs=1)
    assert isinstance(records, list) and all(type(record) is dict for record in records)
    frame = records.frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame["seed"]) == [0, 1]
    assert list(frame["before.retain_acc"]) == [record["before"]["retain_acc"] for record in records]
    assert set(frame["protocol.pretrain_epochs"]) == {1}


def test_rules_may_be_functions_and_classes(run):
    settings = {"my_rule.weight": 0.5, "Mine.weight": np.float32(0.5)}
    by_function, by_class, by_name = run([my_rule, Mine, "retain_finetune"], set=settings)
    assert [r["method"] for r in (by_function, by_class)] == ["my_rule", "Mine"]
    assert by_function["hyperparameters"] == by_class["hyperparameters"] == {"weight": 0.5}
    # Half the gradient is the same step for Adam, but for eps.
    assert by_function["retain_acc"] == pytest.approx(by_name["retain_acc"], abs=0.02)
    assert by_function["retain_acc"] == pytest.approx(by_class["retain_acc"], abs=0.02)


def test_an_interrupted_unlearning_by_a_function_starts_again(run, tmp_path, monkeypatch):
    """What it depends on, such as a global of a notebook, may have changed."""
    scale = [1.0]

    @loss_rule
    def scaled(student, retain, forget):
        return scale[0] * cross_entropy(student(retain.images), retain.labels)

    with monkeypatch.context() as patch:
        patch.setattr("jaxunlearn.runs.running.discard", lambda entry, but=None: None)  # as if it had been killed
        (first,) = run([scaled])
    assert list(tmp_path.glob("cache/unlearning/scaled-*/epoch*"))
    scale[0] = -1.0
    (second,) = run([scaled])
    (fresh,) = run([scaled], cache_dir="fresh")
    assert numbers(second) == numbers(fresh) != numbers(first)


def test_a_seed_means_the_same_run_whichever_generator_jax_is_set_to(run):
    (usual,) = run(["amnesiac"], evaluate="full")
    with jax.default_prng_impl("rbg"):
        (other,) = run(["amnesiac"], evaluate="full", cache_dir="another", out="others")
    assert numbers(usual) == numbers(other) and usual["companions"] == other["companions"]


@pytest.mark.usefixtures("cache_not_given")
def test_settings_of_jax_that_were_made_before_stay(run, tmp_path, monkeypatch):
    before = {name: jax.config.values[name] for name in SETTINGS}
    run()
    assert {name: jax.config.values[name] for name in SETTINGS} == before
    assert any((tmp_path / "cache" / "xla").iterdir())
    with configuration.cache_configured(jax_compilation_cache_dir=str(tmp_path / "mine")):
        run(seeds=[7], cache_dir="another")  # of other programs, none of which is known
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        assert not (tmp_path / "another" / "xla").exists()


@pytest.mark.cpu
@pytest.mark.usefixtures("cache_not_given")
def test_a_folder_of_programs_serves_where_it_is_moved_too(tmp_path):
    def compile_in(folder):
        with configuration.programs_kept(folder):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.jit(lambda x: 3 * x + 1)(np.ones(5, np.float32))
        return {path.name for path in (folder / "xla").iterdir()}

    assert compile_in(tmp_path / "a") == compile_in(tmp_path / "b") != set()


def test_every_flag_is_a_keyword():
    parser = Parser()
    add_arguments(parser)
    flags = {action.dest for action in parser._actions if action.option_strings} - {"help", "help_all", "list", "json"}
    flags -= {"coordinator", "num_processes", "process_id", "method"}  # JAX's own affair; `methods`
    flags -= {"report"}  # of the records
    named = set(inspect.signature(jaxunlearn.run).parameters) - {"methods", "protocol"}
    assert flags == named | {*benchmarks.FLAGS, *benchmarks.SWITCHES}
    assert {*benchmarks.FLAGS, *benchmarks.SWITCHES} <= {field.name for field in dataclasses.fields(Protocol)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 1}, "no such field"),
        ({"model": "vgg16bn"}, "no such field"),
        ({"pretrain_epochs": "many"}, "expected a value like"),
        ({"pretrain_epochs": 1.5}, "expected a value like"),
        ({"pretrain_epochs": 0}, "pretrain_epochs is 0"),
        ({"train_limit": 300.5}, "train_limit is 300.5"),
        ({"seeds": [-1]}, "--seeds -1: write"),
        ({"seeds": []}, "--seeds : write"),
        ({"seeds": [1.5]}, "--seeds 1.5: write"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"set": {"scrub.heat": 1}}, "'scrub' is not among the methods"),
        ({"set": {"heat": 1}}, "write METHOD.KEY"),
        ({"methods": ["scrubb"]}, "did you mean 'scrub'"),
        ({"methods": [lambda context: None]}, "rename the function or class, to letters and digits"),
        ({"methods": [my_rule, my_rule]}, "each method once"),
        ({"methods": [Path("absent.py")]}, "absent.py: no such rule file"),
        ({"methods": [dict]}, "the class has no `unlearn_step`"),
        ({"methods": [Protocol]}, "'Protocol': the class has no `unlearn_step`"),
        ({"methods": [3]}, "unknown method '3'"),
        ({"methods": []}, "at least one"),
        ({"save_every": -1}, "--save-every -1"),
        ({"save_every": None}, "it must be a number"),
        ({"devices": "2"}, "it must be a number"),
        ({"cache_dir": "~nobody-of-this-name/x"}, "cache_dir: RuntimeError"),
        ({"mean": np.zeros(2)}, "three values each"),
        ({"devices": 1000}, "--devices 1000"),
        ({"init_weights": "absent.npz"}, "absent.npz: no such file"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(run, tmp_path, options, said):
    with pytest.raises(UserError) as caught:
        run(**options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_single_values_need_no_list_and_arrays_are_values(run):
    (record,) = run("retain_finetune", 7, mean=np.full(3, 0.5), unlearn_epochs=np.int64(1))
    assert (record["method"], record["seed"]) == ("retain_finetune", 7)
    assert record["protocol"]["mean"] == (0.5, 0.5, 0.5) and record["protocol"]["unlearn_epochs"] == 1
    assert run(my_rule, iter([8]))[0]["method"] == "my_rule"


def test_the_table_is_text_in_a_notebook_and_where_colours_are_forced(run, monkeypatch):
    records = run()
    text = records.table()
    assert "retain_finetune" in text

    class ZMQInteractiveShell:  # what rich takes for Jupyter
        config = ()

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert records.table() == text


def test_a_kept_record_is_a_warning(run, tmp_path):
    run()
    path = tmp_path / "runs" / BENCH / "retain_finetune" / "seed42.json"
    path.write_text(path.read_text().replace('"unlearn_lr": 0.001', '"unlearn_lr": 0.002'))
    with pytest.raises(UserError, match="other settings"):
        run()
    assert run(force=True)[0]["protocol"]["unlearn_lr"] == 0.001


def test_a_machine_with_a_gpu_that_jax_does_not_use_is_told(run, monkeypatch):
    platforms = jax.config.jax_platforms
    monkeypatch.setattr(configuration, "glob", SimpleNamespace(glob=lambda pattern: ["/dev/nvidia0"]))
    try:
        jax.config.update("jax_platforms", None)
        with pytest.warns(UserWarning, match=r"^this machine has an NVIDIA device, but JAX .* CPU: .*cuda"):
            run()
        jax.config.update("jax_platforms", "cpu")  # as the user wishes
        run()
    finally:
        jax.config.update("jax_platforms", platforms)


def test_too_little_memory_is_one_line(run, monkeypatch):
    def prepare(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    monkeypatch.setattr(preparation, "prepare", prepare)
    with pytest.raises(UserError, match=r"^out of device memory: take fewer seeds together or a smaller batch$"):
        run()


def test_importing_the_package_loads_nothing_slow():
    code = "import sys, jaxunlearn, jaxunlearn.commands.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jaxunlearn.commands.bench" in loaded
    assert not {"jax", "numpy", "flax", "rich", "sklearn", "scipy", "pandas"} & set(loaded)


NOTEBOOK = """
    import signal, sys
    sys.path.insert(0, {tests!r})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a kernel
    import jax, jaxunlearn
    from tiny import TINY, Tiny
    from tiny_bench import DIGITS, NAME
    from jaxunlearn.benchmarks import BENCHMARKS
    from jaxunlearn.models import MODELS
    jax.config.update("jax_disable_most_optimizations", True)
    MODELS[TINY] = Tiny
    BENCHMARKS[NAME] = DIGITS
    def cell():
        return jaxunlearn.run(NAME, ["retain_finetune"], cache_dir="cache", save_every=0)
    try:
        cell()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(cell()[0]["status"], signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
"""


def test_ctrl_c_ends_the_run_and_not_the_kernel(tmp_path):
    share_kernels(tmp_path / "cache")
    code = textwrap.dedent(NOTEBOOK).format(tests=str(Path(__file__).parent))
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=inherited) as kernel:
        try:
            while not list(tmp_path.glob("cache/pretrained/*/epoch*")):
                assert kernel.poll() is None
                time.sleep(0.01)
            kernel.send_signal(signal.SIGINT)
            printed, _ = kernel.communicate(timeout=300)
        finally:
            kernel.kill()
    assert printed.decode().split() == ["interrupted", "ok", "True"]
