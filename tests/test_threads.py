"""Work in threads comes in order, runs only a little ahead, and ends with whoever takes it."""

import threading
import time
from collections.abc import Iterator

import pytest

from trainer.threads import in_threads

AHEAD = 4  # threads at most, and as many results wait for whoever takes them


def test_results_come_in_the_order_of_their_tasks() -> None:
    def slower_first(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number * number

    assert list(in_threads(slower_first, range(30))) == [number**2 for number in range(30)]


def test_only_a_few_tasks_are_begun_ahead() -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    for taken, _ in enumerate(in_threads(abs, tasks()), start=1):
        assert len(drawn) <= taken + AHEAD


def test_what_is_wrong_with_a_task_reaches_whoever_takes_it() -> None:
    results = in_threads(lambda number: 1 // (number - 3), range(1000))
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("interrupted", [False, True])
def test_ended_early_no_further_task_is_begun(interrupted: bool) -> None:
    before = threading.active_count()
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
    assert threading.active_count() == before
    assert len(begun) <= 2 + AHEAD
