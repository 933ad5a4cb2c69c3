"""Work in threads comes in order, runs only a little ahead, and ends with whoever takes it."""

import ctypes
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.data.threads import in_threads

AHEAD = 4  # threads at most, and as many results wait for whoever takes them


def test_results_come_in_the_order_of_their_tasks() -> None:
    def slower_first(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number * number

    assert list(in_threads(slower_first, range(30))) == [number**2 for number in range(30)]


def test_only_a_few_tasks_are_begun_ahead() -> None:
    generated: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            generated.append(number)
            yield number

    for taken, _ in enumerate(in_threads(abs, tasks()), start=1):
        assert len(generated) <= taken + AHEAD


def test_what_is_wrong_with_a_task_reaches_whoever_takes_it() -> None:
    results = in_threads(lambda number: 1 // (number - 3), range(1000))
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("interrupted", [False, True])
def test_ended_early_no_further_task_is_begun(interrupted: bool) -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    results = in_threads(work, range(1000))
    next(results)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt)
    else:
        results.close()
    assert len(begun) <= 2 + AHEAD
    done = len(begun)
    time.sleep(0.05)
    assert len(begun) == done  # nothing runs on


class Cancelled(BaseException):
    """What the server raises in the thread of a run that is cancelled."""


def raise_in(thread: threading.Thread, ended: threading.Event) -> None:
    """Cancels as Cog's runtime does; once more where the exception came too early to be seen."""
    identity = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(Cancelled))
    assert ended.wait(10), "the cancelled thread did not end within 10 seconds"


def cancel_often(times: int, work: Callable[[], None]) -> None:
    """Runs `work` again and again in a thread that is cancelled at a random moment."""
    chance = random.Random(1)
    for _ in range(times):
        running, ended = threading.Event(), threading.Event()

        def loop(running: threading.Event = running, ended: threading.Event = ended) -> None:
            try:
                running.set()
                while True:
                    work()
            except Cancelled:
                pass
            finally:
                ended.set()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        running.wait()
        time.sleep(chance.random() * 0.004)
        raise_in(thread, ended)
        thread.join(10)


def use_in_threads() -> None:
    for _ in in_threads(abs, range(3)):
        pass


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_cancelled_user_of_threads_always_ends(times: int) -> None:
    cancel_often(times, use_in_threads)
    assert list(in_threads(abs, range(-9, 0))) == list(range(9, 0, -1))


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_cancelled_start_of_a_thread_always_ends_in_the_worker(times: int) -> None:
    """In a process of its own, because Cog's worker replaces `Thread.start` for good."""
    script = (
        "import test_threads, serving.threads, threading\n"
        "serving.threads.start_threads_safely()\n"
        "def one():\n"
        "    thread = threading.Thread(target=abs, args=(1,)); thread.start(); thread.join()\n"
        f"test_threads.cancel_often({times}, one)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_process_has_threads_of_its_own() -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=use_in_threads)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_a_thread_that_cannot_be_started_says_so_in_the_worker() -> None:
    script = (
        "import serving.threads, threading\n"
        "serving.threads.start_threads_safely()\n"
        "thread = threading.Thread(target=abs, args=(1,)); thread.start()\n"
        "try: thread.start()\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "can only be started once" in done.stdout, done.stderr
