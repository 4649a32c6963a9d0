"""What a bar shows on a terminal, and the lines that a log has in its place."""

import io
import sys

import numpy as np
import pytest

from jaxunlearn import progress
from jaxunlearn.progress import Reporter, spoken


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests put forward; returns the list that holds its time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    return now


def shown(monkeypatch, clock, stderr, quiet=False):
    """A task of 3 epochs of 10 steps and 200 images that goes on from step 12, and takes a second a step."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with Reporter(quiet).task("[scrub]", epochs=3, steps=10, images=200, first=12) as report:
        for done in range(3, 9):
            clock[0] += 1.0
            report(1)(done, {"loss": np.array([[0.5], [1.5]]), "accuracy": np.array([[0.25], [0.25]])})
    return stderr.getvalue()


def test_a_terminal_shows_epoch_loss_accuracy_speed_and_the_time_left(monkeypatch, clock):
    text = shown(monkeypatch, clock, Terminal())
    assert "[scrub]" in text  # as it is: markup would swallow it
    assert "epoch 2/3  loss 1.000  accuracy 0.250  20 images/s" in text
    assert " 60%" in text and ":" in text.rsplit("images/s", 1)[1]


def test_a_pass_before_the_first_epoch_is_told_and_does_not_move_the_bar(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Reporter().task("[ssd]", epochs=3, steps=10, images=200) as report:
        report(-2)(7, {"batch": np.array([[6], [6]])})
        report(0)(1, {})
    text = sys.stderr.getvalue()
    assert "[ssd]" in text and "passes to go: 2, batch 7" in text and "  0%" in text and "batch 6" not in text


def test_nothing_is_shown_where_quiet_is_asked_for(monkeypatch, clock):
    assert shown(monkeypatch, clock, Terminal(), quiet=True) == ""
    assert steps_of(monkeypatch, clock, Reporter(quiet=True).before(1e6), io.StringIO(), 60) == ""


def steps_of(monkeypatch, clock, reporter, stderr, seconds, epoch=0):
    """What is said of a task of 80 epochs of 100 steps and 1,000 images, in an epoch, with so many seconds a step."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with reporter.task("[scrub]", epochs=80, steps=100, images=1000, first=100 * max(0, epoch)) as report:
        for done in range(1, 100):
            clock[0] += seconds
            report(epoch)(done, {"loss": np.array([[0.5]])} if epoch >= 0 else {})
    return stderr.getvalue()


def test_a_log_has_few_lines_that_say_how_far_it_is(monkeypatch, clock):
    assert shown(monkeypatch, clock, io.StringIO()) == ""  # nothing in the first minute
    lines = steps_of(monkeypatch, clock, Reporter(), io.StringIO(), 10).splitlines()
    assert lines[0] == "[scrub]: 0%  epoch 1/80  loss 0.500  1 images/s  about 22 h to go"
    assert len(lines) == 4  # after one, three, seven and fifteen minutes
    passes = steps_of(monkeypatch, clock, Reporter(), io.StringIO(), 1, epoch=-2)
    assert passes == "[scrub]: passes to go: 2, batch 60\n"


def test_an_epoch_in_pieces_is_measured_from_the_end_of_the_first_where_all_is_compiled(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Reporter().task("[scrub]", epochs=80, steps=100, images=1000) as report:
        for epoch, seconds in ((0, (70, 0.001)), (1, (40, 10)), (2, (40, 10))):  # the first 90 steps, and the others
            for done, spent in zip((90, 100), seconds, strict=True):
                clock[0] += spent
                report(epoch)(done, {"loss": np.array([[0.5]])})
    assert sys.stderr.getvalue() == "[scrub]: 2%  epoch 2/80  loss 0.500  22 images/s  about 58 min to go\n"


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_what_takes_long_says_so_once_and_counts_what_comes_after(monkeypatch, clock, stderr):
    whole = Reporter(advice="; try less")
    first = steps_of(monkeypatch, clock, whole.before(72_000, advise=True), stderr(), 0.5)
    assert first.count("about ") == 1  # 80,000 - 610 and 72,000 images, twenty a second
    assert "about 2 h 10 min to go at 20 images/s; try less" in first
    assert "try less" not in steps_of(monkeypatch, clock, whole.before(72_000, advise=True), stderr(), 0.5)
    assert "try less" not in steps_of(monkeypatch, clock, Reporter(advice="; try less").before(0), stderr(), 0.5)


def test_what_is_done_soon_or_nobody_knows_is_not_told(monkeypatch, clock):
    assert steps_of(monkeypatch, clock, Reporter().before(0), io.StringIO(), 0.05) == ""
    assert steps_of(monkeypatch, clock, Reporter(), io.StringIO(), 0.5) == ""


def test_of_several_runs_those_to_come_are_counted_whole(monkeypatch, clock):
    several = Reporter().before(0, 80_000).repeated(8)
    begun = steps_of(monkeypatch, clock, several, io.StringIO(), 0.5)
    assert "about 8 h 50 min to go" in begun  # eight times 80,000 images, twenty a second
    ending = steps_of(monkeypatch, clock, Reporter().before(0, 80_000).repeated(8), io.StringIO(), 0.5, epoch=79)
    assert "about 7 h 50 min to go" in ending  # seven of the eight are still to come


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5, "1 min"), (600, "10 min"), (3500, "58 min"), (3900, "1 h"), (7800, "2 h 10 min"), (126_000, "35 h")],
)
def test_times_are_said_as_people_say_them(seconds, said):
    assert spoken(seconds) == said
