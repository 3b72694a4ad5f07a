"""Batches one ahead: the next is put together while the present one is worked on.

Which items a micro-batch holds is a function of (seed, step): the thread adds no state to a run.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(
    tasks: Iterable[Callable[[], T]], abandon: Callable[[], None] = lambda: None
) -> Generator[T, None, None]:
    """The results of `tasks` in their order; a thread works on the one after that in use.

    What a task raises is raised where its result is due. To be closed if it is left early; then,
    and at an interruption, `abandon` is called, which may tell a long task to end.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        due: Future[T] | None = None
        try:
            for task in tasks:
                following = pool.submit(task)
                if due is not None:
                    yield due.result()
                due = following
            if due is not None:
                yield due.result()
        except BaseException:
            abandon()
            raise
