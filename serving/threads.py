"""Starts the threads of Cog's worker where a cancellation cannot reach them.

The runtime cancels a request by raising an exception in its thread. If that thread is just starting
another one, CPython can raise the exception in the new thread: `Thread.start` then waits forever,
often holding a lock that all thread pools share, and the server stays busy. Libraries start threads
when they like (progress bars, trackers, uploads, loading of weights), so all are started by one
thread that is never cancelled.
"""

import functools
import threading
from queue import SimpleQueue

_Start = tuple[threading.Thread, "SimpleQueue[BaseException | None]"]
_start_here = threading.Thread.start


def start_threads_safely() -> None:
    """From now on, every thread of this process is started by a thread of its own for that."""
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
        # One C call. A cancellation is raised after it, when the thread runs.
        if (error := done.get()) is not None:
            raise error

    threading.Thread.start = start  # type: ignore[method-assign]
