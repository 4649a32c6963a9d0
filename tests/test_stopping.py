import os
import signal
import threading

import pytest

from jaxunlearn.training.stopping import SIGNALS, deferred


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
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


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked()
    os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_leaves_signals_alone():
    seen = []

    def work():
        with deferred() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]
