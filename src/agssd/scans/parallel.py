"""Work on many items by several processes, results in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(ValueError):
    """A process ended before it had done its work."""


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ready: Callable[[Item], Result | None] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with its result, in the order of the items; at most 4 results per worker wait in memory.

    Args:
        function: picklable; called in fresh processes of one thread each, or right here for one worker.
        items: picklable.
        workers: number of processes, at least 1.
        ready: called here before; what it returns, unless None, is taken for the result of the item.

    Raises:
        WorkerDiedError: a process died.
    """
    if workers == 1:
        for item in items:
            found = ready(item) if ready is not None else None
            yield item, function(item) if found is None else found
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    def result(waited: Any) -> Any:
        return waited.result() if isinstance(waited, Future) else waited

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        waiting: deque[tuple[Item, Any]] = deque()
        try:
            for item in items:
                found = ready(item) if ready is not None else None
                waiting.append((item, pool.submit(function, item) if found is None else found))
                if len(waiting) >= 4 * workers:
                    first, waited = waiting.popleft()
                    yield first, result(waited)
            while waiting:
                first, waited = waiting.popleft()
                yield first, result(waited)
        except BrokenProcessPool as error:
            raise WorkerDiedError("a worker died, most likely for want of memory; use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Give each worker one thread, for the processes are the parallelism, and let it end when its parent is killed."""
    import torch

    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
