"""Saves the state of a run on SIGTERM and Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.learning.loop import Loop


@contextmanager
def stopped_by_signals(loop: Loop) -> Iterator[None]:
    """Within the context, SIGTERM and Ctrl-C raise an exception, so that the loop saves its state.

    Only the first signal counts: a second one must not interrupt saving. Use it only around the
    loop: before and after it there is nothing to save, and an interrupted library may report a
    file as broken. Other handlers of the program are kept.

    With several processes, the launcher sends SIGTERM to all others when one fails. After an error
    it is ignored, so that this process can still report what it saved; a launcher kills one that
    does not end.
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
    except BaseException:
        if loop.processes.num_processes > 1:
            before = dict.fromkeys(before, signal.SIG_IGN)
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
