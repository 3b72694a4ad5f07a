"""Loading one ahead changes when a batch is made, not what it is."""

import functools
import threading
import time
from collections.abc import Callable

import pytest

from pipelines.prefetch import one_ahead


def test_results_come_in_order_and_the_next_is_begun_before_one_is_used() -> None:
    begun = [threading.Event() for _ in range(5)]

    def task(number: int) -> Callable[[], int]:
        def work() -> int:
            begun[number].set()
            return number

        return work

    found = []
    for result in one_ahead(task(number) for number in range(5)):
        assert result == 4 or begun[result + 1].wait(10)
        found.append(result)
    assert found == list(range(5))


def test_an_error_is_raised_where_its_result_is_due_and_leaving_early_starts_nothing_more() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 2:
            raise MemoryError("no room")
        done.append(number)
        return number

    results = one_ahead(functools.partial(work, number) for number in range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(MemoryError, match="no room"):
        next(results)
    results = one_ahead(functools.partial(work, number) for number in range(4, 9))
    assert next(results) == 4
    results.close()
    assert done == [0, 1, 3, 4, 5]  # one ahead each
    assert not any(own.name.startswith("ahead") for own in threading.enumerate())


def test_a_task_under_way_is_told_to_end_when_it_is_left() -> None:
    is_left = threading.Event()
    tasks = [lambda: True, lambda: is_left.wait(60), lambda: True]
    results = one_ahead(tasks, is_left.set)
    assert next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 30
