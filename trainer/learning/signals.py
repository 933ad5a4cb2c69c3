"""SIGTERM and Ctrl-C end a run so that its state is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.learning.loop import Loop


@contextmanager
def stopped_by_signals(loop: Loop) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the run by an exception that lets the loop save its state.

    The first of them is the only one: a second one must not interrupt the saving. Before and
    after the loop there is nothing to save, and a library that is interrupted may call a file
    broken. A program that has handlers of its own keeps them.
    """
    ours = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    main = threading.current_thread() is threading.main_thread()
    before = {
        each: handler
        for each, handler in ours.items()
        if main and signal.getsignal(each) == handler
    }

    def stop(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        interrupted = number == signal.SIGINT
        loop.stop(KeyboardInterrupt() if interrupted else SystemExit(128 + number))

    try:
        for each in before:
            signal.signal(each, stop)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
