"""Every command and every piece of code of the documentation runs, page by page, on tiny models and few images."""

import dataclasses
import functools
import re
import runpy
import sys
from pathlib import Path

import pytest
from documented import ELSEWHERE, PAGES, ROOT, SHELL, Block, blocks, commands
from tiny import TINY

import jaxunlearn
from jaxunlearn.benchmarks import BENCHMARKS, get_benchmark
from jaxunlearn.commands.main import main, make_parser
from jaxunlearn.data.sources import DATASETS
from jaxunlearn.errors import UserError
from jaxunlearn.models import MODELS
from jaxunlearn.registry import members_of
from jaxunlearn.runs import request
from jaxunlearn.runs.request import get_methods, parse_seeds, parse_settings

# Commands that are not run: what they have in them, and why.
NOT_RUN = {
    "-m venv": "CI does, by the README's own lines",
    "pip install": "the same",
    "bin/activate": "there is no such environment",
    "-m pytest": "these are the tests",
    "ruff": "CI does",
    "mypy": "CI does",
    "sphinx-build": "CI does",
    "tensorboard --logdir": "serves until it is stopped",
    "--init-weights resnet20_cifar10_seed42.npz": "nobody has the file here; weights.md runs with its own",
    "--init-weights vgg16bn_cifar100_seed42.npz": "the same",
    "--init-weights mobilenetv2_fmnist_seed42.npz": "the same",
    "--models 32 --plot": "as many models as it takes are many; the tutorial runs an audit",
    "--plots figures": "draws all figures twice; the page draws them before, and test_report.py runs it",
    "jaxunlearn speed": "times programs for minutes; test_speed.py",
    "jaxunlearn parity": "needs PyTorch; test_parity.py",
    "jaxunlearn gpu-check": "needs a GPU; test_gpu_check.py",
}
# What is said behind a command's own words, and so in place of them. Of its seeds there is the first, so that a program
# is compiled once for all pages.
SMALLER = {
    "bench": ["--devices", "1", "--batch-size", "32", "--drop-last"],  # as small benchmarks have it themselves
    "tune": ["--devices", "1", "--trials", "1"],
    "audit": ["--devices", "1", "--models", "4", "--together", "1"],
}
GROUP = ("retain_finetune",)  # stands for every group of methods
# Blocks of these languages are no commands and no code.
SHOWN = ("", "text", "{toctree}", "{argparse}", "{eval-rst}")

# One program for all benchmarks: their models are the tiny one and their images some of the digits.
DIGITS = BENCHMARKS["resnet20-digits-class0"]
SMALL = {name: getattr(DIGITS, name) for name in ("dataset", "mean", "std", "batch_size", "drop_last", "flip")}
SMALL |= {"train_limit": 320, "pretrain_epochs": 1, "unlearn_epochs": 1}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def all_of(path: Path) -> list[Block]:
    return blocks(path.read_text())


def everywhere() -> list[tuple[str, Block]]:
    return [(f"{page_name(path)}:{block.line}", block) for path in PAGES for block in all_of(path)]


def smaller(words: list[str]) -> list[str]:
    """The arguments of `jaxunlearn`, smaller: what comes last is what counts."""
    more = list(SMALLER.get(words[0], []))
    if words[0] == "tune" or "--validation" in words:
        more += ["--train-limit", "350"]  # of which 320 are trained on, as elsewhere
    if "--seeds" in words:
        more += ["--seeds", str(parse_seeds(words[words.index("--seeds") + 1])[0])]
    return words + more


@functools.wraps(jaxunlearn.run)
def smaller_run(bench, methods=None, seeds=42, **options):
    first = seeds if isinstance(seeds, int) else next(iter(seeds))
    return jaxunlearn.api.run(bench, methods, first, **options | {"devices": 1})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all pages: what one has pretrained the next takes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, cache, monkeypatch):
    """An empty folder in which a page's blocks run, with small benchmarks of tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    before = [(table, dict(table)) for table in (BENCHMARKS, MODELS, DATASETS)]
    tiny = MODELS[TINY]
    for name in set(MODELS) - {TINY}:
        MODELS[name] = lambda num_classes, dtype, **_: tiny(num_classes=num_classes, dtype=dtype)
    for name, protocol in BENCHMARKS.items():
        BENCHMARKS[name] = dataclasses.replace(protocol, **SMALL)
    monkeypatch.setattr(jaxunlearn, "run", smaller_run)
    monkeypatch.setattr(request, "members_of", lambda name: GROUP if members_of(name) else ())
    yield tmp_path
    for table, content in before:
        table.clear()
        table.update(content)


def run_command(words: list[str]) -> None:
    """Does what a command of a page does, in this process."""
    program, *arguments = words
    if Path(program).name in ("python", "python3"):
        file, *arguments = arguments
        if not file.startswith("scripts/"):
            run_file(file, smaller(arguments) if arguments else [])
            return
        assert (ROOT / file).exists()
        arguments = [Path(file).stem.replace("_", "-"), *arguments]
    else:
        assert Path(program).name == "jaxunlearn", f"nobody knows how to run {program}"
    assert main(smaller(arguments)) == 0


def run_file(file: str, arguments: list[str]) -> None:
    """`python FILE ARGUMENTS`"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *arguments])
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code


def check(words: list[str]) -> None:
    """Fails where a command that is not run has words that are wrong: flags, benchmarks, methods, files of tests."""
    for file in (word for word in words if word.startswith("tests/")):
        assert (ROOT / file).exists(), file
    if script := next((word for word in words if word.startswith("scripts/")), None):
        assert (ROOT / script).exists(), script
        words = ["jaxunlearn", Path(script).stem.replace("_", "-"), *words[words.index(script) + 1 :]]
    if "jaxunlearn" not in words:
        return
    args = make_parser().parse_args(words[words.index("jaxunlearn") + 1 :])
    get_benchmark(getattr(args, "bench", None) or "resnet20-digits-class0")
    methods = getattr(args, "method", None) or []
    get_methods([methods] if isinstance(methods, str) else methods or None, parse_settings(getattr(args, "set", [])))


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("path", [path for path in PAGES if all_of(path)], ids=page_name)
def test_a_page_runs_from_its_top_to_its_end(path, folder, capsys):
    for library in (
        ("matplotlib", "jinja2") if re.search("import matplotlib|jaxunlearn report", path.read_text()) else ()
    ):
        pytest.importorskip(library)
    namespace = {"__name__": "__main__"}
    for block in all_of(path):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            lines_above = "\n" * (block.line - 1)
            exec(compile(lines_above + block.text, path, "exec"), namespace)
        for words in commands(block):
            text = " ".join(words)
            if block.language == ELSEWHERE or any(part in text for part in NOT_RUN):
                check(words)
            else:
                run_command(words)
                assert not capsys.readouterr().err, text


def test_commands_are_found_as_a_shell_would():
    text = "A\n\n```console\n$ jaxunlearn bench \\\n    --set 'a.b=1 2' && ls {x,y}.py\nout $ put\n```\n"
    text += "\n```python\n# a.py\n```\n"
    shown, program = blocks(text)
    assert (shown.line, shown.file, program.line, program.file) == (4, "", 10, "a.py")
    assert commands(shown) == [["jaxunlearn", "bench", "--set", "a.b=1 2"], ["ls", "x.py", "y.py"]]
    assert commands(shown._replace(language="bash"))[-1] == ["out", "$", "put"] and commands(program) == []


def test_what_is_not_run_is_read():
    for wrong in ("bench --bench resnet20", "speed --bench resnet20-digits-class0 --fast", "audit --method scrubb"):
        command, *words = wrong.split()
        with pytest.raises(UserError):
            check(["srun", "jaxunlearn", command, *words])
        with pytest.raises(UserError):
            check(["python", f"scripts/{command}.py", *words])
    with pytest.raises(AssertionError):
        check(["python", "-m", "pytest", "tests/test_absent.py"])


def test_every_block_is_of_a_known_language():
    known = (*SHELL, "python", *SHOWN)
    assert [where for where, block in everywhere() if block.language not in known] == []
    shown = [(where, block) for where, block in everywhere() if block.language == "console"]
    assert [where for where, block in shown if not commands(block)] == []
    assert [page_name(path) for path in PAGES if re.search(r"^\s*~~~", path.read_text(), re.MULTILINE)] == []


def test_nothing_is_left_out_that_is_not_there():
    lines = [" ".join(words) for _, block in everywhere() for words in commands(block)]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []


def test_a_file_of_a_page_is_used_on_it():
    for path in PAGES:
        used = [word for block in all_of(path) for words in commands(block) for word in words]
        assert {block.file for block in all_of(path)} <= {"", *used}, page_name(path)
