"""Work that is done ahead of its use: in threads, and handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def done_ahead(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    threads: int,
    ahead: int,
    begin: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """`work` of each item, in order, done in `threads` threads up to `ahead` items before its use.

    Items are asked for in the thread that uses the results. What `work` raises is raised where its
    result would have come; what `items` raises, at once. Then, or closed early, nothing more is
    begun. Each thread calls `begin` before anything else.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "ahead", initializer=begin) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
