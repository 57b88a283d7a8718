"""Work on many items by several processes, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Yield every item with its result, in the order of the items; at most 2 results per worker wait in memory.

    Args:
        function: picklable; called in fresh processes of one thread each, or right here for one worker.
        items: picklable.
        workers: number of processes, at least 1.

    Raises:
        ValueError: a process died.
    """
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_limit_threads) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) >= 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise ValueError("a worker died, most likely for want of memory; use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _limit_threads() -> None:
    """Give each worker one thread: the processes are the parallelism."""
    import torch

    torch.set_num_threads(1)
