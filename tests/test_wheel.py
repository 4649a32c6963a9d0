"""The package as it is installed: a wheel in an environment of its own, outside the checkout."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jobs import share_kernels

ROOT = Path(__file__).parent.parent
BENCH = "resnet20-digits-class0"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools would take what an earlier build has left beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "jaxunlearn", folder / "source" / "jaxunlearn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of an environment that has the wheel and the libraries, but not the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], cwd=folder, check=True)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True)
    own = next((folder / "env").glob("lib/python*/site-packages"))
    # Folders named in a .pth file do not have theirs read, so an editable install of the checkout is not seen.
    (own / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    share_kernels(folder / "cache" / "jaxunlearn")

    def run(command, *arguments):
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GLIBC_TUNABLES")}
        # Compiles in a third of the time; what is packed has no part in how XLA optimises.
        environment = kept | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
        words = [str(folder / "env" / "bin" / command), *arguments]
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jaxunlearn/")}
    files = (path for path in (ROOT / "jaxunlearn").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert there == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_command_runs_a_benchmark(run):
    where = run("python", "-c", "import jaxunlearn; print(jaxunlearn.__file__)")
    assert "elsewhere" in where.stdout
    arguments = ("--bench", BENCH, "--pretrain-epochs", "1", "--unlearn-epochs", "1", "--method", "retain_finetune")
    arguments += ("--train-limit", "80", "--batch-size", "8", "--no-against-retrain")
    done = run("jaxunlearn", "bench", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "retain_finetune" in done.stdout and "pretrained" in done.stdout
    for wrong, said in ((["bnch"], "invalid choice"), ([], "required: COMMAND")):
        done = run("jaxunlearn", *wrong)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert {"bench", "speed", "parity"} <= set(run("jaxunlearn", "--help").stdout.split())


def test_what_needs_pytorch_says_so_in_one_line(run):
    blocked = "import sys; sys.modules['torch'] = None; from jaxunlearn.commands.main import main; sys.exit(main())"
    for command in (["parity", "--bench", BENCH], ["speed", "--bench", BENCH, "--against", "torch"]):
        done = run("python", "-c", blocked, *command)
        assert done.returncode == 2 and "pip install 'torch>=2.10'" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
