"""Runs that are killed, stopped or short of disk, and what the same command makes of them afterwards."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import METHODS, SETUPS, STEPS, Job
from tiny_bench import DIGITS, NAME

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What each setup leaves when nothing happens; made once, which also compiles."""
    outcomes = {}
    for setup in SETUPS:
        job = Job(tmp_path_factory.mktemp("undisturbed"), setup)
        assert job.finish() == ""
        outcomes[setup] = job.outcome()
        assert not list((job.folder / "cache").glob("unlearning/*"))  # it goes with the last record
    assert len(outcomes["two seeds"]) > 2 * len(METHODS)  # pretrained models' leaves, and these
    return outcomes


def a_moment(number):
    """A random position, whether to wait from there for a checkpoint that is being written, else how long to wait."""
    rng = random.Random(number)
    phase = rng.randrange(1 + len(METHODS))
    epoch = rng.randrange(DIGITS.pretrain_epochs if phase == 0 else DIGITS.unlearn_epochs)
    return (phase, epoch, rng.randrange(STEPS)), number % 2 == 0, rng.uniform(0, 0.1)


def kill_and_resume(folder, setup, moments):
    """Kills a run at each of these moments, starting it again in between, and then lets it end."""
    job, kills = Job(folder, setup), []
    for target, while_writing, delay in sorted(moments):
        before = job.progress()
        process = job.start()
        try:
            while process.poll() is None and (job.progress() < target or job.progress() <= before):
                time.sleep(0.01)
            if while_writing:
                while process.poll() is None and not list(job.folder.glob("cache/*/*/*.orbax-checkpoint-tmp*")):
                    time.sleep(0.001)
            else:
                time.sleep(delay)
        finally:
            process.kill()
            _, err = process.communicate()
        kills.append((process.returncode, job.progress(), err))
    return kills, job.finish(), job.outcome()


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path, undisturbed, setup):
    moments = [a_moment(number) for number in range(10)]
    with ThreadPoolExecutor(2) as pool:  # three runs, in each of which the moments lie far apart
        jobs = [pool.submit(kill_and_resume, tmp_path / str(n), setup, moments[n::3]) for n in range(3)]
    results = [job.result() for job in jobs]
    kills = [kill for killed, *_ in results for kill in killed]
    for _, err, outcome in results:
        assert err == ""  # nothing was damaged
        assert outcome == undisturbed[setup], kills
    assert {code for code, *_ in kills} <= {-signal.SIGKILL, 0} and not any(err for *_, err in kills), kills
    assert sum(code != 0 for code, *_ in kills) >= 8  # the last moments may come too late
    assert len({killed_at for _, killed_at, _ in kills}) >= 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, undisturbed, number):
    job = Job(tmp_path, "two seeds", "--save-every", "1000")
    process = job.start()
    while job.progress() < (0, DIGITS.pretrain_epochs, 0):  # the end of pretraining is saved in any case
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "interrupted: the same command goes on from the last checkpoint\n")
    assert job.finish() == ""
    assert job.outcome() == undisturbed["two seeds"]


def test_two_processes_that_want_the_same_model_train_it_once(tmp_path, undisturbed):
    first, second = (Job(tmp_path, "two seeds", "--out", out) for out in ("runs", "more"))
    processes = [first.start(), second.start()]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert any("waiting for it to finish" in err for err in said)
    records = [path.read_text() for path in tmp_path.glob(f"*/{NAME}/scrub/seed1.json")]
    seconds = [next(line for line in text.splitlines() if "pretrain_s" in line) for text in records]
    assert len(seconds) == 2 and seconds[0] == seconds[1]  # as the one that trained it wrote down
    assert first.outcome() == undisturbed["two seeds"]
