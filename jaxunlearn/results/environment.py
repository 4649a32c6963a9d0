"""What a result was measured on."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxunlearn.devices.configuration import DETERMINISTIC
from jaxunlearn.ops import native
from jaxunlearn.ops.batching import on_cpu
from jaxunlearn.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """What a result was measured on, as JSON values, without anything that names a person, a machine or a folder.

    Returns:
      `versions` (of this package, Python and `PACKAGES`; None: not installed), `device_kind`, `device_count` (all that
      JAX sees), `deterministic` (whether the same command has the same bits), `cpu` {`model`, `cores` this process may
      use, `compiled_kernels`: whether they are used}, `git_commit` (of this package's checkout, ending in "-dirty" when
      tracked files were changed; None outside a checkout).
    """
    own = {"jaxunlearn": __version__, "python": platform.python_version()}
    return {
        "versions": own | {name: _version(name) for name in PACKAGES},
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "deterministic": on_cpu() or DETERMINISTIC in os.environ.get("XLA_FLAGS", ""),
        "cpu": {
            "model": _cpu_model(),
            "cores": _cores(),
            "compiled_kernels": on_cpu() and native.library() is not None,
        },
        "git_commit": _git_commit(Path(__file__)),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:  # Linux; elsewhere `platform` knows, on Linux it mostly does not
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _git_commit(file: Path) -> str | None:
    """Commit of the checkout that tracks `file`, or None: someone else's checkout around site-packages is not it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        # With every tag excluded, describe prints the bare commit.
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
