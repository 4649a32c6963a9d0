"""Command lines that nobody would write on purpose: they are ready to run, or one line says why not."""

import os

import pytest
from fuzzing import fuzzed, inside, outcome
from hypothesis import given
from hypothesis import strategies as st
from test_bench import BENCH, bench

from jaxunlearn import files
from jaxunlearn.devices import configuration
from jaxunlearn.errors import LONGEST, one_line
from jaxunlearn.registry import parse_value
from jaxunlearn.results.rows import summarize
from jaxunlearn.runs import running

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
__all__ = ["bench", "inside"]  # fixtures


RULE = (
    "from jaxunlearn.methods.rule import cross_entropy, loss_rule\n\n@loss_rule\n"
    "def rule(student, retain, forget, *, a=None, b='x', c=(1.0, 2), d=True, e=3):\n"
    "    return cross_entropy(student(retain.images), retain.labels)\n"
)


@pytest.fixture
def ready(bench, inside, monkeypatch):
    """Runs the command line up to where training would start: 0 or 2, and what the contract says of each."""
    monkeypatch.setattr(running, "results", lambda run: iter(()))
    (inside / "file").touch()
    (inside / "nowhere").symlink_to("absent")
    (inside / "mine.py").write_text(RULE)

    def run(*arguments):
        before = sorted(inside.rglob("*"))
        status, out, err = bench("--json", "--bench", BENCH, *arguments)
        assert (status, out) in ((0, ""), (2, ""))
        if status:
            assert err.startswith("error: ") and err[:-1].isprintable() and err[-1] == "\n" and len(err) < LONGEST + 20
            left = [path for path in sorted(inside.rglob("*")) if "__pycache__" not in path.parts]
            assert left == [path for path in before if "__pycache__" not in path.parts]
        return status, err

    return run


WORDS = (
    "|0|1|-1|2|42|0.5|1.|nan|-nan|inf|1e999|1e-320|1_0|+5|٣|１| 3 |0x10|true|FALSE|None|scrub|B|retain|fp32|bf16|-|--|,"
    "|0-3|3-1|1,1|1-|-1-2|0-99999999999|(1,2,3)|[1|(1,)|{1:2,'a':3}|{1,2}|b'x'|...|1j|'a'|''|[[[]]]|.|..|/|file|nowhere"
    "|mine.py|file/x|~/x|~nobody/x|/dev/null|/dev/zero|/proc/self/mem|[/red]|%s|{}|a\nb|\x1b[2J|\udcff|a\0b|\u202e"
)
NUMBERS = ["9" * 30, "9" * 4000, "9" * 5000, "-" + "9" * 400, f"(1{'0' * 400},1,1)", "(" * 3000]
TEXT = st.sampled_from(WORDS.split("|")) | st.sampled_from([*NUMBERS, "x" * 300])
FLAGS = (
    "seeds devices forget-class batch-size pretrain-epochs unlearn-epochs train-limit epoch-length crop-padding "
    "precision mobilenet-stride resnet-shortcut init-weights export-weights out data-dir method bench x"
)
DEFAULTS = [1.0, 2, True, "x", None, (), (1.0, 2.0), (1,), ("a",), [1], {"a": 1}]
FIELDS = [f"protocol.{name}" for name in ("mean", "std", "flip", "crop_pixels", "pretrain_lr", "adam_b1", "model", "x")]
OWNERS = [*FIELDS, *(f"mine.{key}" for key in "abcdef"), "mine", ".", "a.b.c"]
OPTIONS = st.one_of(
    st.tuples(st.sampled_from([f"--{flag}" for flag in FLAGS.split()]), TEXT),
    st.tuples(st.sampled_from(["--drop-last", "--mia-augment", "--force", "--quiet", "--list=", "--set", "--seeds"])),
    st.tuples(st.just("--set"), st.tuples(st.sampled_from(OWNERS), TEXT).map("=".join)),
)


@fuzzed(60)
@given(options=st.lists(OPTIONS, min_size=1, max_size=3), method=st.sampled_from(["mine.py", "mine.py", "retrain"]))
def test_any_options(options, method, ready):
    ready("--method", method, *(word for option in options for word in option))


@fuzzed(300)
@given(
    text=TEXT | st.text(),
    default=st.sampled_from([1.0, 2, True, "x", None, (), (1.0, 2.0), (1,), ("a",), [1], {"a": 1}]),
)
def test_any_settings(text, default):
    value = outcome(parse_value, "mine.key", text, default)
    assert value is None or isinstance(value, type(default)) or default is None or type(default) in (list, dict)


# ---- what failed once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "a\nb"], r"--seeds a\nb: write"),
        (["--set", "\x1b[2J=1"], r"--set \x1b[2J=1: write NAME.KEY=VALUE"),
        (["--method", "x" * 5000], "[...]"),
        (["--init-weights", "a\0b"], r"a\x00b: no such file"),
        (["--init-weights", "/dev/zero"], "/dev/zero: no such file"),
        (["--method", "x" * 300 + "/a.py"], "no such rule file"),
        (["--method", "\udcff.py"], r"\udcff.py: its results could not be named like it: rename the file"),
        (["--method", "...py"], "rename the file"),
        (["--method", "x" * 248 + ".py"], "rename the file"),
        (["--out", "a\0b"], "Invalid argument; choose another folder"),
        (["--out", "nowhere"], "cannot write to nowhere"),
        (["--cache-dir=nowhere/x", "--export-weights", "nowhere/x"], "cannot write to nowhere/x"),
        (["--export-weights", "x" * 300], "File name too long"),
        (["--set", f"protocol.mean=(1{'0' * 400},1,1)"], "expected a value like"),
        (["--batch-size", "9" * 4000], "it must be at least 1 and at most 1,000,000"),
        (["--pretrain-epochs", "9" * 30], "at most 1,000,000"),
        (["--unlearn-epochs", "1000001"], "at most 1,000,000"),
        (["--method", "mine.py", "--set", "mine.a={1: 2, 'b': 3}"], "expected a value like None"),
    ],
)
def test_command_lines(arguments, said, ready):
    status, err = ready(*arguments)
    assert status == 2 and said in err


def test_records_of_a_name_that_is_too_long(ready):
    status, err = ready("--out", "/".join(["x" * 200] * 21))
    assert status == 2 and "File name too long" in err


def test_no_more_threads_than_a_machine_has_devices(monkeypatch):
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"})
    configuration.request_devices(10**8)  # XLA died of as many, before it could say that there are fewer devices
    assert int(os.environ["NPROC"]) <= 4 * 256


def test_an_exception_without_a_text_is_named():
    class Silent(Exception):
        def __str__(self):
            raise ValueError

    assert one_line(Silent()) == "Silent"


def test_a_place_for_records_may_be_a_link(inside):
    (inside / "real").mkdir()
    (inside / "link").symlink_to("real")
    files.check_writable(inside / "link" / "new")


def test_a_setting_in_the_table_is_printable():
    record = {"method": "mine", "seed": 0, "before": None, "hyperparameters": {"a": "x\n\udcff"}}
    record |= {"symmetric_score": None, "timing": {"unlearn_s": 1.0, "evaluate_s": 1.0}}
    assert summarize([record], {"mine": {"a": "y"}})[0].variant == r"a=x\n\udcff"
