"""Runs that are killed, stopped or short of disk, and what the same command makes of them afterwards."""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from orbax.checkpoint import PyTreeCheckpointer
from tiny_bench import DIGITS, NAME

from jaxunlearn.checkpoints import Entry

METHODS = ("scrub",)
STEPS = 320 // 16  # an epoch of pretraining; of unlearning 18
SETUPS = {"two seeds": ("--seeds", "1,2", "--devices", "1"), "two devices": ("--seeds", "3", "--devices", "2")}


class Job:
    """The tiny benchmark in a folder of its own; compiled programs are shared."""

    def __init__(self, folder, compiled, setup, *arguments):
        self.folder = folder
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        if not (folder / "cache" / "xla").exists():
            (folder / "cache" / "xla").symlink_to(compiled)
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
        """All that a run leaves, to the bit: pretrained models, unlearned ones, metrics."""
        bits = {}
        for folder in (self.folder / "cache" / "pretrained").iterdir():
            (path,) = folder.iterdir()
            for name, leaf in PyTreeCheckpointer().restore(path).items():
                bits[folder.name, name] = leaf.tobytes()
        for path in (self.folder / "weights").rglob("*.safetensors"):
            bits[path.relative_to(self.folder)] = path.read_bytes()
        return bits


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled):
    """What each setup leaves when nothing happens; made once, which also compiles."""
    outcomes = {}
    for setup in SETUPS:
        job = Job(tmp_path_factory.mktemp("undisturbed"), compiled, setup)
        assert job.finish() == ""
        outcomes[setup] = job.outcome()
        assert not list((job.folder / "cache").glob("unlearning/*"))  # it goes with the last record
    assert len(outcomes["two seeds"]) > 2 * len(METHODS)  # pretrained models' leaves, and these
    return outcomes


def kill_and_resume(folder, compiled, setup, moment):
    """Kills at a random moment: once a random position is passed, at times while a checkpoint is written."""
    rng = random.Random(moment)
    job = Job(folder, compiled, setup)
    phase = rng.randrange(1 + len(METHODS))
    target = (
        phase,
        rng.randrange(DIGITS.pretrain_epochs if phase == 0 else DIGITS.unlearn_epochs),
        rng.randrange(STEPS),
    )
    while_writing, delay = moment % 2 == 0, rng.uniform(0, 0.1)
    process = job.start()
    try:
        while process.poll() is None and job.progress() < target:
            time.sleep(0.01)
        if while_writing:
            while process.poll() is None and not list(job.folder.glob("cache/*/*/*.orbax-checkpoint-tmp*")):
                time.sleep(0.001)
        else:
            time.sleep(delay)
    finally:
        process.kill()
        process.communicate()
    killed_at = job.progress()
    return process.returncode, killed_at, job.finish(), job.outcome()


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path, compiled, undisturbed, setup):
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(kill_and_resume, tmp_path / str(n), compiled, setup, n) for n in range(10)]
    results = [job.result() for job in jobs]
    for code, killed_at, err, outcome in results:
        assert err == ""  # nothing was damaged
        assert outcome == undisturbed[setup], killed_at
        assert code in (-signal.SIGKILL, 0)
    assert sum(code != 0 for code, *_ in results) >= 8  # the last moments may come too late
    assert len({killed_at for _, killed_at, *_ in results}) >= 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, compiled, undisturbed, number):
    job = Job(tmp_path, compiled, "two seeds", "--save-every", "1000")
    process = job.start()
    while job.progress() < (0, DIGITS.pretrain_epochs, 0):  # the end of pretraining is saved in any case
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "interrupted: the same command goes on from the last checkpoint\n")
    assert job.finish() == ""
    assert job.outcome() == undisturbed["two seeds"]


def test_two_processes_that_want_the_same_model_train_it_once(tmp_path, compiled, undisturbed):
    first, second = (Job(tmp_path, compiled, "two seeds", "--out", out) for out in ("a", "b"))
    processes = [first.start(), second.start()]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert any("waiting for it to finish" in err for err in said)
    records = [path.read_text() for path in sorted(tmp_path.glob(f"[ab]/{NAME}/scrub/seed1.json"))]
    seconds = [next(line for line in text.splitlines() if "pretrain_s" in line) for text in records]
    assert len(seconds) == 2 and seconds[0] == seconds[1]  # as the one that trained it wrote down
    assert first.outcome() == undisturbed["two seeds"]
