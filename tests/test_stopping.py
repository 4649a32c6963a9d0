import os
import signal
import threading

import pytest

from jaxunlearn.commands import main
from jaxunlearn.training.stopping import SIGNALS, URGENT, deferred


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", URGENT)
def test_the_first_signal_asks_and_the_second_interrupts(number):
    ended = False
    with pytest.raises(KeyboardInterrupt), deferred() as asked:  # it raises at its end
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        ended = True
    assert ended
    with pytest.raises(KeyboardInterrupt):  # outside, as before
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_warning_may_come_twice(number):
    ended = False
    with pytest.raises(KeyboardInterrupt), deferred() as asked:
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert asked()
        os.kill(os.getpid(), signal.SIGTERM)  # the first of its kind
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        ended = True
    assert ended
    with pytest.raises(KeyboardInterrupt):  # outside, as before
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with deferred() as asked:
        os.kill(os.getpid(), number)
        assert not asked()
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("ignored", [None, signal.SIGHUP])
def test_a_command_ends_by_every_signal_that_is_not_ignored(monkeypatch, ignored):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = {}

    def run():
        inside.update({number: signal.getsignal(number) for number in SIGNALS})
        return 3

    monkeypatch.setattr(main, "main", run)
    with pytest.raises(SystemExit) as ended:
        main.start()
    assert ended.value.code == 3
    assert inside == {n: signal.SIG_IGN if n == ignored else signal.default_int_handler for n in SIGNALS}
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_leaves_signals_alone():
    seen = []

    def work():
        with deferred() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]
