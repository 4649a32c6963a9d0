"""What a bar shows on a terminal, and that nothing is shown elsewhere."""

import io
import sys

import numpy as np
import pytest

from jaxunlearn import progress
from jaxunlearn.progress import Reporter


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


@pytest.mark.parametrize(("stderr", "quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_nothing_is_shown_without_a_terminal_or_where_quiet_is_asked_for(monkeypatch, clock, stderr, quiet):
    assert shown(monkeypatch, clock, stderr, quiet) == ""
