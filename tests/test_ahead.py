"""Work done ahead: in order, a few items ahead and no more, and errors in their places."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import closing

import pytest

from omnigen_pipe.ahead import done_ahead


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (1, 3), (4, 2), (3, 50)])
def test_results_come_in_order(threads: int, ahead: int) -> None:
    squares = done_ahead(range(40), lambda n: n * n, threads, ahead)
    assert list(squares) == [n * n for n in range(40)]


def test_items_are_asked_for_by_who_uses_them_and_only_a_few_ahead() -> None:
    asked: list[int] = []

    def items() -> object:
        for number in range(100):
            assert threading.current_thread() is threading.main_thread()
            asked.append(number)
            yield number

    with closing(done_ahead(items(), str, 2, 3)) as results:  # type: ignore[arg-type]
        assert [next(results) for _ in range(5)] == list("01234")
        assert len(asked) == 5 + 3


def test_an_error_comes_where_its_result_would_have_come() -> None:
    def work(number: int) -> float:
        return 1 / (number - 3)

    results = done_ahead(range(10), work, 2, 4)
    assert [next(results) for _ in range(3)] == [1 / -3, 1 / -2, 1 / -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_closed_early_what_has_not_begun_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    working, cancelled = threading.Event(), threading.Event()
    cancel = Future.cancel

    def noted(future: Future[int]) -> bool:
        asked.append(future)
        found = cancel(future)
        if len(asked) == 5:
            cancelled.set()
        return found

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            working.set()
            cancelled.wait(10)
        return number

    asked: list[Future[int]] = []
    monkeypatch.setattr(Future, "cancel", noted)
    results = done_ahead(range(100), work, 1, 5)
    assert next(results) == 0
    working.wait()
    results.close()
    assert begun == [0, 1]
