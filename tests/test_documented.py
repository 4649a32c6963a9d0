"""Every command and every piece of code of the documentation runs, page by page, on tiny models and few images."""

import dataclasses
import functools
import glob
import importlib.util
import inspect
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from documented import PAGES, ROOT, SHELL, Block, blocks, command_lines, commands
from tiny import TINY

import jaxunlearn
from jaxunlearn import benchmarks
from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.commands.main import COMMANDS, main, make_parser, script
from jaxunlearn.data.sources import DATASETS
from jaxunlearn.models import MODELS, build
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import get_method
from jaxunlearn.runs.request import parse_seeds

pytestmark = [pytest.mark.slow, pytest.mark.cpu, pytest.mark.usefixtures("tiny_models", "compile_once")]

# What is not run: what a command has in it, and why.
NOT_RUN = {
    "-m venv": "CI does, by the README's own lines",
    "pip install": "CI installs by the README's own lines",
    "-m pytest": "these are the tests",
}
# Commands that are only read, by the real parser: their benchmarks and methods are there.
ONLY_READ = {
    "speed": "times programs for minutes; test_speed.py",
    "parity": "needs PyTorch; test_parity.py",
    "gpu-check": "needs a GPU; test_gpu_check.py",
}
# What is said behind a command's own words, and so in place of them.
SMALLER = {
    "bench": ["--devices", "1"],
    "tune": ["--devices", "1", "--trials", "2"],
    "audit": ["--devices", "1", "--models", "4", "--together", "4"],
}
# Files of weights that a reader is to have.
WEIGHTS = [
    "resnet20.th",
    "resnet20_cifar10_seed42.npz",
    "vgg16bn_cifar100_seed42.npz",
    "mobilenetv2_fmnist_seed42.npz",
]
# Blocks of these languages are no commands and no code.
SHOWN = ("", "text", "json", "{toctree}", "{argparse}", "{eval-rst}")

# One program for all benchmarks: their models are the tiny one and their images some of the digits.
DIGITS = BENCHMARKS["resnet20-digits-class0"]
SMALL = {name: getattr(DIGITS, name) for name in ("dataset", "mean", "std", "batch_size", "drop_last", "flip")}
SMALL |= {"train_limit": 320, "pretrain_epochs": 1, "unlearn_epochs": 1}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def all_blocks() -> list[tuple[str, Block]]:
    return [(page_name(path), block) for path in PAGES for block in blocks(path.read_text())]


def smaller(words: list[str]) -> list[str]:
    """The arguments of `jaxunlearn`, smaller: what comes last is what counts."""
    more = list(SMALLER.get(words[0], []))
    if "--seeds" in words:
        seeds = parse_seeds(words[words.index("--seeds") + 1])[:2]
        more += ["--seeds", ",".join(map(str, seeds))]
    return words + more


@functools.wraps(jaxunlearn.run)
def smaller_run(*arguments, **options):
    given = inspect.signature(jaxunlearn.api.run).bind(*arguments, **options).arguments
    seeds = given.get("seeds", 42)
    given["seeds"] = seeds if isinstance(seeds, int) else list(seeds)[:2]
    protocol = given.pop("protocol", {})
    return jaxunlearn.api.run(**given | protocol | {"devices": 1})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all pages: what one has pretrained the next takes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, cache, monkeypatch):
    """Where a page's blocks run: what of a checkout they may read or change, and small models and benchmarks."""
    for name in ("README.md", "docs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "results").symlink_to(ROOT / "results")
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
    yield tmp_path
    for table, content in before:
        table.clear()
        table.update(content)


def run_command(words: list[str]) -> None:
    """Runs a command of a page as its words say, in this process."""
    words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    program, *arguments = [Path(words[0]).name, *words[1:]]
    name = Path(arguments[0]).stem if program in ("python", "python3") else ""
    if name and arguments[0] == f"scripts/{name}.py":
        assert (ROOT / arguments[0]).exists()
        program, arguments = "jaxunlearn", [name.replace("_", "-"), *arguments[1:]]
    if name and program != "jaxunlearn":
        own = smaller(arguments[1:]) if arguments[1:] else []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [arguments[0], *own])
            runpy.run_path(arguments[0], run_name="__main__")
            raise SystemExit(0)
        assert not ended.value.code
        return
    assert program == "jaxunlearn", f"nobody knows how to run {program}"
    read = make_parser().parse_args(arguments)
    if arguments[0] in ONLY_READ:
        read_only(read)
        return
    for file in WEIGHTS:
        if getattr(read, "init_weights", None) == Path(file):
            write_weights(Path(file))
    assert main(smaller(arguments)) == 0


def read_only(args) -> None:
    """Raises UserError where a command that is not run names a benchmark or a method that is not there."""
    if getattr(args, "bench", None):
        benchmarks.get_benchmark(args.bench)
    methods = getattr(args, "method", None) or []
    for method in [methods] if isinstance(methods, str) else methods:
        get_method(method)


def write_weights(path: Path) -> None:
    """A state_dict of the tiny model, as an .npz."""
    params, batch_stats = make_network(BENCHMARKS["resnet20-digits-class0"], 10).initialise(seed_keys([0])[0])
    with path.open("wb") as file:
        np.savez(file, **to_state_dict({"params": params, "batch_stats": batch_stats}))


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path.read_text())], ids=page_name)
def test_a_page_runs_from_its_top_to_its_end(path, folder, capsys):
    namespace = {"__name__": "__main__"}
    for block in blocks(path.read_text()):
        where = f"{page_name(path)}:{block.line}"
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), namespace)
        elif block.language in SHELL:
            for words in commands(block):
                if any(part in " ".join(words) for part in NOT_RUN):
                    continue
                run_command(words)
                assert not capsys.readouterr().err, where
        else:
            assert block.language in SHOWN, f"{where}: {block.language} is no language of these pages"


def test_nothing_is_left_out_that_is_not_there():
    lines = [" ".join(words) for _, block in all_blocks() if block.language in SHELL for words in commands(block)]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []
    assert [name for name in ONLY_READ if not any(f"jaxunlearn {name} " in line for line in lines)] == []
    assert [file for file in WEIGHTS if not any(file in line for line in lines)] == []
