"""The tiny benchmark as a command in a folder of its own, which tests may kill, and what it leaves."""

import json
import subprocess
import sys
from pathlib import Path

from orbax.checkpoint import PyTreeCheckpointer
from tiny_bench import NAME

from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.files import default_cache
from jaxunlearn.training.checkpoints import Entry

METHODS = ("scrub",)
STEPS = 320 // 16  # an epoch of pretraining; of unlearning 18
SETUPS = {"two seeds": ("--seeds", "1,2", "--devices", "1"), "two devices": ("--seeds", "3", "--devices", "2")}


KERNELS = "kernels"  # in a cache folder


def share_kernels(cache):
    """Makes a cache folder whose kernels are those of the tests themselves."""
    kept = default_cache() / KERNELS
    for folder in (cache, kept):
        folder.mkdir(parents=True, exist_ok=True)
    if not (cache / KERNELS).exists():
        (cache / KERNELS).symlink_to(kept)


class Job:
    """The tiny benchmark in a folder of its own; what is compiled is shared."""

    def __init__(self, folder, setup, *arguments):
        self.folder = folder
        share_kernels(folder / "cache")
        where = ("--cache-dir", "cache", "--export-weights", "weights", "--save-every", "0")
        self.command = [sys.executable, str(Path(__file__).parent / "tiny_bench.py"), "--bench", NAME, *where]
        self.command += ["--method", *METHODS, *SETUPS[setup], *arguments]

    def start(self, **options):
        return subprocess.Popen(
            self.command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    def finish(self, **options):
        """Runs to the end; returns what it said on stderr."""
        process = self.start(**options)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return err

    def progress(self):
        """(phase, epoch, step) of the newest checkpoint: pretraining is phase 0, each method one more."""
        phases = ["pretrained", *METHODS]
        folders = (path for kind in ("pretrained", "unlearning") for path in self.folder.glob(f"cache/{kind}/*"))
        found = [
            (phases.index(folder.name.split("-")[0] if folder.parent.name == "unlearning" else "pretrained"), *position)
            for folder in folders
            for position in Entry(folder, {}).positions
        ]
        return max(found, default=(-1, 0, 0))

    def outcome(self):
        """All that a run leaves, to the bit: pretrained models, unlearned ones, what they scored."""
        bits = {}
        for folder in (self.folder / "cache" / "pretrained").iterdir():
            (path,) = folder.iterdir()
            for name, leaf in PyTreeCheckpointer().restore(path).items():
                bits[folder.name, name] = leaf.tobytes()
        for path in (self.folder / "weights").rglob("*.safetensors"):
            bits[path.relative_to(self.folder)] = path.read_bytes()
        for path in (self.folder / "runs").rglob("*.json"):
            record = json.loads(path.read_text())
            bits[path.relative_to(self.folder)] = record["before"], [record[name] for name in METRICS]
        return bits
