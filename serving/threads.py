"""Starts all threads of Cog's worker from one thread that is never cancelled.

The runtime cancels a request by raising an exception in its thread. If that thread is starting
another one, CPython can raise the exception in the new thread: `Thread.start` then waits forever,
often holding a lock that all thread pools share, and the server stays busy. Libraries start threads
at any time (progress bars, trackers, uploads, loading of weights).
"""

import functools
import threading
from queue import SimpleQueue

_Start = tuple[threading.Thread, "SimpleQueue[BaseException | None]"]
_start_here = threading.Thread.start


def start_threads_safely() -> None:
    """Patches `Thread.start`, so that a dedicated thread starts all threads of this process."""
    if threading.Thread.start is not _start_here:
        return
    wanted: SimpleQueue[_Start] = SimpleQueue()

    def serve() -> None:
        while True:
            thread, done = wanted.get()
            try:
                _start_here(thread)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)
            del thread, done

    starter = threading.Thread(target=serve, name="thread-starter", daemon=True)
    _start_here(starter)

    @functools.wraps(_start_here)
    def start(self: threading.Thread) -> None:
        if threading.current_thread() is starter or not starter.is_alive():  # as after a fork
            return _start_here(self)
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        wanted.put((self, done))
        # One C call: a cancellation is raised after it, when the thread runs.
        if (error := done.get()) is not None:
            raise error

    threading.Thread.start = start  # type: ignore[method-assign]
