"""Work in threads, in order and a little ahead, for what releases Python's lock: decoding."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_threads(work: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result]:
    """What `work` makes of each task, in order, a few of them ahead of whoever takes them.

    Ended early, by an exception or because nobody takes more, it starts no further task and waits
    for those that run.
    """
    threads = min(4, os.cpu_count() or 1)  # each may hold a large photo
    pool = ThreadPoolExecutor(threads)
    try:
        begun: deque[Future[Result]] = deque()
        for task in tasks:
            begun.append(pool.submit(work, task))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
