"""Leaving when asked: the first Ctrl-C or SIGTERM lets the step end, the second does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """The signal that asked to stop, if any has."""

    signal: int | None = None

    def obey(self) -> None:
        """Raise `Stopped` where a signal has asked to stop."""
        if self.signal is not None:
            raise Stopped(self.signal)


class Stopped(BaseException):
    """A signal ends the work here. No `Exception`, so that nothing takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within it SIGINT and SIGTERM are noted; a second one acts at once as it normally would.

    Outside the main thread, where Python allows no handlers, it notes nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in previous:
        signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Stopped` where the program is.

    Outside the main thread, where Python allows no handlers, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
