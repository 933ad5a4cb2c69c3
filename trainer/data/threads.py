"""Runs tasks in threads, in order and a few ahead, for work that releases the GIL: decoding.

A server cancels a run by raising an exception in its thread, between any two lines of Python
(`PyThreadState_SetAsyncExc`). Such a thread must not start another one: until it runs, CPython can
raise the exception in the new thread instead, and `Thread.start` then waits forever. It must not
use a lock written in Python (`Future`, `Queue`, `Condition`) either: it can stay locked. So the
threads are started when this module is imported, and only `SimpleQueue`, one C call, is used.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)  # each may hold a large photo


class _Job:
    """One task, and its result or the exception that it raised."""

    def __init__(self, work: Callable[[Any], Any], task: Any, stopped: list[bool]) -> None:
        self.work, self.task, self.stopped = work, task, stopped
        self.done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        result, error = None, None
        try:
            if not self.stopped:
                result = self.work(self.task)
        except BaseException as raised:
            error = raised
        self.done.put((result, error))

    def result(self) -> Any:
        result, error = self.done.get()
        if error is not None:
            raise error
        return result


_jobs: "SimpleQueue[_Job]"


def _run_jobs(jobs: "SimpleQueue[_Job]") -> None:
    while True:
        jobs.get().run()  # without a variable, which would keep a large result alive


def _start() -> None:
    global _jobs
    _jobs = SimpleQueue()
    for number in range(THREADS):
        name = f"in_threads-{number}"
        threading.Thread(target=_run_jobs, args=(_jobs,), name=name, daemon=True).start()


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)  # a fork has no threads of its parent


def in_threads(work: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result]:
    """Yields the result of `work` for each task, in order, with a few tasks started ahead.

    If the caller stops early or an exception is raised, no further task is started, and running
    tasks are awaited.
    """
    stopped: list[bool] = []  # not empty: tasks that are still queued are skipped
    begun: deque[_Job] = deque()
    try:
        for task in tasks:
            job = _Job(work, task, stopped)
            _jobs.put(job)
            begun.append(job)
            if len(begun) > THREADS:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        stopped.append(True)
        while begun:
            begun.popleft().done.get()
