"""Webhooks: events of a training, sent to addresses as they happen.

Each webhook has a thread and a bounded queue of its own: an address that hangs or is gone costs
training nothing, and another webhook nothing either. What cannot be delivered is dropped, counted,
and said at the end. An address is a secret (whoever knows it can write there): nothing here says
more of it than the end of its host's name.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from manifests.errors import UsageError
from omnigen_pipe.config import WebhookConfig
from omnigen_pipe.events import Event, EventFile

#: Events that wait for a webhook; where more come, what is worth least is dropped.
QUEUE_LENGTH = 64
#: Bytes of files that wait for a webhook: pictures are large.
QUEUE_BYTES = 64 << 20
#: Seconds in which a server must be reached, take an event, and answer: for each so many.
TIMEOUT = 10.0
#: Bytes a second that a line must carry, at least: large files have longer to be taken.
SLOWEST = 50_000
#: Seconds between the tries of one event.
PAUSES = (1.0, 4.0, 16.0)
#: Seconds that a server may ask to be left alone for.
LONGEST_PAUSE = 60.0
#: Seconds in which, at the end, what still waits may be delivered.
PATIENCE = 20.0
#: Discord refuses longer messages, and more files.
_DISCORD_LENGTH = 2000
_DISCORD_FILES = 10
#: What an event is worth where not all can wait: these, and 2 the others.
_WORTH: dict[str, int] = {"preview": 0, "step": 1, "end": 3, "error": 3}
_LEAST = 0
#: What a server says of a body that is larger than it takes.
_TOO_LARGE = "HTTP 413"
#: Fields of a message for people, in this order, and how each is said.
_SAID = {
    "total_steps": "of {}",
    "loss": "loss {:.4g}",
    "learning_rate": "lr {:.1e}",
    "clip_score": "CLIP score {:.2f}",
    "picture": "{}",
    "inference_step": "drawn {}",
    "num_inference_steps": "of {}",
    "repository": "pushed to {}",
    "message": "{}",
}


@dataclass(frozen=True)
class Address:
    """Where a webhook goes. Its `url` is never shown; `label` is what it is called."""

    url: str
    label: str

    def __repr__(self) -> str:
        """Without the address."""
        return f"Address({self.label})"


def addresses(webhooks: Sequence[WebhookConfig]) -> list[Address]:
    """The address of each webhook; raises `UsageError` where one is missing or is none."""
    return [_address(number, webhook) for number, webhook in enumerate(webhooks, start=1)]


def _address(number: int, webhook: WebhookConfig) -> Address:
    if webhook.url is not None:
        place, text = f"the url of [[webhook]] {number}", webhook.url.get_secret_value()
    else:
        assert webhook.url_env is not None  # the configuration is checked
        place = f"the environment variable {webhook.url_env}, named by [[webhook]] {number},"
        text = os.environ.get(webhook.url_env, "")
        if not text:
            raise UsageError(
                f"There is nothing in {place.rstrip(',')}. Set it to the webhook's address, or "
                "take the webhook out."
            )
    if not _is_address(text):
        raise UsageError(f"What stands in {place} is no address: it begins with https://HOST/.")
    return Address(text, f"webhook {number} ({_shown(str(urlsplit(text).hostname))})")


def _shown(host: str) -> str:
    """What may be said of `host`: an IP address as it is, of a name the last two labels. Of some
    services what is before them is the secret."""
    try:
        return str(ip_address(host))
    except ValueError:
        return ".".join(host.rstrip(".").split(".")[-2:])


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return (
        plain and parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
    )


@dataclass(frozen=True)
class Message:
    """What is posted: a body and its media type."""

    body: bytes
    media_type: str


def message(event: Event, form: str, run: str, at: datetime) -> Message:
    """`event` of the run `run` in the form `json` or `discord`; with files it is multipart."""
    if form == "discord":
        text = _sentence(event, run)
        said: dict[str, Any] = {
            "content": text if len(text) <= _DISCORD_LENGTH else text[: _DISCORD_LENGTH - 1] + "…",
            "allowed_mentions": {"parse": []},  # a prompt that says @everyone calls nobody
        }
        name, files = "payload_json", event.files[:_DISCORD_FILES]
        parts = [(f"files[{number}]", file) for number, file in enumerate(files)]
    else:
        moment = at.astimezone(timezone.utc).isoformat(timespec="seconds")
        said = {"event": event.name, "run": run, "time": moment, **event.fields}
        name = "event"
        parts = [(f"file{number}", file) for number, file in enumerate(event.files)]
    encoded = json.dumps(said, allow_nan=False, default=str).encode()
    if not parts:
        return Message(encoded, "application/json")
    return _multipart([(name, EventFile("", encoded, "application/json")), *parts])


def _sentence(event: Event, run: str) -> str:
    """An event in a line for people."""
    fields = event.fields
    said = [f"**{run}** {event.name}"]
    if "step" in fields:
        said.append(f"step {fields['step']}")
    said += [
        form.format(fields[name]) for name, form in _SAID.items() if fields.get(name) is not None
    ]
    if event.name == "validation" and "drawn" in fields:
        said.append(f"{fields['drawn']} drawn")
    if failed := fields.get("failed"):  # how many, or that something has
        said.append("failed" if failed is True else f"{failed} failed")
    if fields.get("signal") is not None:
        said.append(f"stopped by {signal.Signals(fields['signal']).name}")
    return " · ".join(said)


def _multipart(parts: Sequence[tuple[str, EventFile]]) -> Message:
    boundary = uuid4().hex
    body: list[bytes] = []
    for name, file in parts:
        # Names are the sender's own, but one with a quote must not end the header.
        safe = "".join(c if c.isalnum() or c in " ._-" else "_" for c in file.name)
        named = f'; filename="{safe}"' if file.name else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n'
        head += f"Content-Type: {file.media_type}\r\n\r\n"
        body += [head.encode("utf-8"), file.content, b"\r\n"]
    body.append(f"--{boundary}--\r\n".encode())
    return Message(b"".join(body), f"multipart/form-data; boundary={boundary}")


@dataclass(frozen=True)
class Answer:
    """How a post ended: None for a delivery, else why not; and whether to try again, and when."""

    why: str | None = None
    again: bool = False
    pause: float | None = None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry an event to an address that nobody has written down."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect's own status is the answer."""


class _InTime(io.RawIOBase):
    """What a server answers, read within the socket's timeout altogether. Left to itself, each
    single read has that long: a server that drips would hold a webhook for ever."""

    def __init__(self, answer: io.BufferedIOBase, sock: socket.socket) -> None:
        self._answer = answer
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._end = time.monotonic() + (self._timeout or 0.0)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As many bytes as are there; raises `TimeoutError` where none come in time."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        try:
            return self._answer.readinto1(buffer)
        finally:  # a proxy's answer is followed by more on the same socket
            self._sock.settimeout(self._timeout)

    def close(self) -> None:
        """Let go of the socket."""
        self._answer.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    """One on which sending alone may take long: so many seconds as `sending` says. Reaching the
    server, and its answer, have the timeout that it was made with."""

    sending: float

    def connect(self) -> None:
        """As ever."""
        super().connect()
        self.sock.settimeout(self.sending)

    def getresponse(self) -> http.client.HTTPResponse:
        """As ever, once all is sent."""
        self.sock.settimeout(self.timeout)
        return super().getresponse()


class _Response(http.client.HTTPResponse):
    """One that comes in time."""

    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.fp: io.BufferedReader = io.BufferedReader(_InTime(self.fp, sock))


class _Timed(urllib.request.AbstractHTTPHandler):
    def do_open(self, http_class: Any, req: Any, **named: Any) -> http.client.HTTPResponse:
        """As ever, but the answer must come in time, and a large body has longer to be sent."""
        sending = req.timeout + len(req.data or b"") / SLOWEST
        members = {"response_class": _Response, "sending": sending}
        timed: Any = type("_TimedConnection", (_Connection, http_class), members)
        return super().do_open(timed, req, **named)


class _TimedHTTP(_Timed, urllib.request.HTTPHandler):
    """Over http."""


class _TimedHTTPS(_Timed, urllib.request.HTTPSHandler):
    """Over https."""


_OPENER = urllib.request.build_opener(_NoRedirects, _TimedHTTP, _TimedHTTPS)


def post(address: Address, said: Message, timeout: float = TIMEOUT) -> Answer:
    """Post once. The server must be reached, and answer, in `timeout` seconds each; it may take the
    body for so long and as long as that has on the slowest line. Nothing that the answer says
    contains the address."""
    request = urllib.request.Request(
        address.url,
        said.body,
        {"Content-Type": said.media_type, "User-Agent": "omnigen-pipe"},
        method="POST",
    )
    try:
        with _OPENER.open(request, timeout=timeout):
            return Answer()
    except urllib.error.HTTPError as error:
        with error:
            code = error.code
            again = code in (408, 429) or code >= 500
            return Answer(f"HTTP {code}", again, _asked_pause(error.headers.get("Retry-After")))
    except (OSError, http.client.HTTPException, ValueError) as error:  # also of a host's name
        return Answer(_why(error, timeout), again=True)


def _asked_pause(text: str | None) -> float | None:
    """The seconds that `Retry-After` asks for, within bounds; a date is not understood."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return min(seconds, LONGEST_PAUSE) if seconds >= 0 else None  # None also of "nan"


def _why(error: Exception, timeout: float) -> str:
    """Why nothing could be sent, not in the library's words: those may hold the address."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:.3g} s"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "not reached, or not taken, in time"
    if isinstance(cause, socket.gaierror):
        return "its host was not found"
    if isinstance(cause, ConnectionError):
        return (cause.strerror or "the connection was closed").lower()
    return type(cause).__name__


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An event that waits to be sent, and when it came."""

    event: Event
    at: datetime

    @property
    def worth(self) -> int:
        """The larger, the later it is dropped."""
        return _WORTH.get(self.event.name, 2)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(len(file.content) for file in self.event.files)


def _too_large(waiting: int, added: int) -> bool:
    """Whether files of so many bytes are too many beside those that wait; alone none are."""
    return added > 0 and waiting > 0 and waiting + added > QUEUE_BYTES


class Webhook:
    """One address and its thread. `tell` is a listener of events, and never waits."""

    def __init__(
        self,
        address: Address,
        config: WebhookConfig,
        run: str,
        *,
        timeout: float = TIMEOUT,
        wait: Callable[[Callable[[], bool], float], bool] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        """`wait` pauses until what it is given is true, for so many seconds at most, and says
        whether it is; `now` is the clock."""
        self.address = address
        self._config = config
        self._run = run
        self._timeout = timeout
        self._now = now
        #: Guards all that follows; the thread is the only one to wait for it.
        self._changed = threading.Condition()
        self._wait = wait or self._changed.wait_for
        self._given_up = False
        self._waiting: list[_Waiting] = []
        self._closing = False
        #: Of the files of what waits, and of what is being sent.
        self._bytes = 0
        self._taken = 0
        self._delivered = 0
        self._lost: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._deliver_all, daemon=True, name="webhook")
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Take `event` to be sent, where it is asked for. Where too much waits already, what is
        worth less is dropped for it, or the event itself."""
        if event.name not in self._config.events:
            return
        if event.name == "step" and int(event.fields["step"]) % self._config.step_interval:
            return
        one = _Waiting(event, self._now())
        with self._changed:
            self._taken += 1
            dropped = self._dropped_for(one)
            if dropped is None:
                self._lost["too many waited"] += 1
                return
            for other in dropped:
                self._waiting.remove(other)
                self._bytes -= other.size
                self._lost["too many waited"] += 1
            self._waiting.append(one)
            self._bytes += one.size
            self._changed.notify()

    def _dropped_for(self, one: _Waiting) -> list[_Waiting] | None:
        """What must go for `one` to wait, too; None where it is `one` itself."""
        count, size = len(self._waiting), self._bytes
        dropped: list[_Waiting] = []
        # A new preview is worth more than an old one.
        for worth in range(max(1, one.worth)):
            for other in self._waiting:
                full = count >= QUEUE_LENGTH
                if not full and not _too_large(size, one.size):
                    return dropped
                if other.worth == worth and (full or other.size):
                    dropped.append(other)
                    count -= 1
                    size -= other.size
        fits = count < QUEUE_LENGTH and not _too_large(size, one.size)
        return dropped if fits else None

    def close(self, patience: float = PATIENCE) -> str | None:
        """Deliver what waits, previews last, within `patience` seconds; a sentence where something
        was lost."""
        with self._changed:
            self._closing = True
            self._previews_last()
            self._changed.notify()
        self._thread.join(patience)
        with self._changed:
            self._given_up = True
            self._changed.notify()
            undelivered = self._taken - self._delivered - sum(self._lost.values())
            if undelivered:
                self._lost["the end came first"] += undelivered
            if not self._lost:
                return None
            reasons = ", ".join(f"{n}: {why}" for why, n in self._lost.most_common())
            lost = sum(self._lost.values())
            return f"{lost} of {self._taken} events did not reach {self.address.label} ({reasons})."

    def _previews_last(self) -> None:
        self._waiting.sort(key=lambda one: one.worth == _LEAST)

    def _deliver_all(self) -> None:
        while (one := self._next()) is not None:
            event, at = one.event, one.at
            why = self._deliver(message(event, self._config.form, self._run, at), one.worth)
            if why == _TOO_LARGE and event.files:  # better the words alone than nothing
                bare = replace(event, files=())
                why = self._deliver(message(bare, self._config.form, self._run, at), one.worth)
            with self._changed:
                self._bytes -= one.size
                if self._given_up:
                    return  # it is counted already
                if why is None:
                    self._delivered += 1
                else:
                    self._lost[why] += 1

    def _next(self) -> _Waiting | None:
        """What is to be sent next, once there is something; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.pop(0) if self._waiting else None

    def _deliver(self, said: Message, worth: int) -> str | None:
        """Post until it is taken; else why it was not."""
        for pause in (*PAUSES, None):
            answer = post(self.address, said, self._timeout)
            if answer.why is None or not answer.again or pause is None:
                break
            if self._is_given_up(pause if answer.pause is None else answer.pause, worth):
                break
        return answer.why

    def _is_given_up(self, seconds: float, worth: int) -> bool:
        """Wait `seconds` for the next try of an event of this `worth`; whether there is none. A
        preview must not hold up what is worth more, nor the end."""

        def is_over() -> bool:
            if self._given_up or worth > _LEAST:
                return self._given_up
            return self._closing or any(other.worth > worth for other in self._waiting)

        with self._changed:
            over = self._wait(is_over, seconds)
            if over:  # the previews before it would be refused as this one was
                self._previews_last()
            return over


def opened(webhooks: Sequence[WebhookConfig], run: str) -> list[Webhook]:
    """A running webhook for each that is configured; raises as `addresses` does."""
    found = addresses(webhooks)
    return [Webhook(a, config, run) for a, config in zip(found, webhooks, strict=True)]


def close(webhooks: Sequence[Webhook], patience: float = PATIENCE) -> list[str]:
    """Close all, within `patience` seconds together; a sentence for each that lost something."""
    end = time.monotonic() + patience
    sentences = [webhook.close(max(0.0, end - time.monotonic())) for webhook in webhooks]
    return [sentence for sentence in sentences if sentence is not None]
