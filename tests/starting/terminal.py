"""A program on a real pseudo-terminal: what it shows is waited for, and keys are sent to it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

#: Seconds after which something that was waited for is missed. Imports of torch take long.
_PATIENCE = 120.0
_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The keyboard and the screen of a running program."""

    def __init__(self, process: subprocess.Popen[bytes], handle: int) -> None:
        self.process = process
        self.shown = ""
        self._seen = 0
        self._handle = handle

    def wait_for(self, text: str) -> str:
        """Read until `text` is shown; returns what was shown since the last wait."""
        deadline = time.monotonic() + _PATIENCE
        while text not in self.shown[self._seen :]:
            assert self._read(deadline), f"{text!r} is not in:\n{self.shown}"
        start = self._seen
        self._seen = self.shown.index(text, start) + len(text)
        return self.shown[start : self._seen]

    def type(self, line: str) -> None:
        """Type `line` and the Enter key."""
        self.press(line + "\r")

    def press(self, keys: str) -> None:
        """Send these keys."""
        os.write(self._handle, keys.encode())

    def answer(self, question: str, line: str = "") -> str:
        """Wait for `question`, answer it, and return what was shown before it and with it."""
        shown = self.wait_for(question) + self.wait_for_prompt()
        self.type(line)
        return shown

    def wait_for_prompt(self) -> str:
        """Read until an answer is waited for; returns what was shown since the last wait."""
        deadline = time.monotonic() + _PATIENCE
        while not self.shown[self._seen :].endswith(": "):
            assert self._read(deadline), f"there is no prompt at the end of:\n{self.shown}"
        start, self._seen = self._seen, len(self.shown)
        return self.shown[start:]

    def leave(self, key: str) -> int:
        """Press `key`, again where it has no effect for some seconds; returns the exit status.

        CPython misses the effect of a signal that comes after readline has shown its prompt and
        before it waits for keys, until the next one.
        """
        deadline = time.monotonic() + _PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            self.press(key)
            while self._read(time.monotonic() + 3):
                pass
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        return self.exit_status()

    def exit_status(self) -> int:
        """Read to the end, and return the status that the program leaves with."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(_PATIENCE)

    def _read(self, deadline: float) -> bool:
        """Read what is shown next; False at the end, or at the deadline."""
        ready, _, _ = select.select([self._handle], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            piece = os.read(self._handle, 65536)
        except OSError:  # how Linux ends a terminal whose last program is gone
            return False
        self.shown += _STYLE.sub("", piece.decode(errors="replace")).replace("\r\n", "\n")
        return bool(piece)


@contextmanager
def on_terminal(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[Terminal]:
    """Start `command` in `folder` as the program that a new terminal belongs to."""
    keyboard, screen = pty.openpty()
    # Wide, so that no sentence is wrapped, and as typed keys come: Ctrl-C is a signal.
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))
    # A login of its own makes the terminal the controlling one, so that Ctrl-C reaches it; and a
    # job in the background, as these tests may be, hands on that Ctrl-C is ignored.
    owner = (
        "import fcntl, os, signal, sys, termios; "
        "signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", owner, *command],
        cwd=folder,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", **environment},
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )
    os.close(screen)
    try:
        yield Terminal(process, keyboard)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(keyboard)
