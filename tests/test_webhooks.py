"""Webhooks, against a server on this machine that takes, refuses, hangs and closes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message as Mail
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from manifests.errors import UsageError
from omnigen_pipe import webhooks
from omnigen_pipe.config import WebhookConfig
from omnigen_pipe.events import Event, EventFile, Events
from omnigen_pipe.webhooks import PAUSES, QUEUE_LENGTH, Address, Webhook, addresses

SECRET = "path-that-is-secret"
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
#: Instead of a status.
CUT, HANG, DRIP = 0, -1, -2


@dataclass
class Server:
    """What a server was sent, and how it answers: by `answers`, then 204."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    got: list[tuple[str, bytes]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    #: Set when a request hangs.
    hanging: threading.Event = field(default_factory=threading.Event)
    #: Set when a request is refused, and when one is taken.
    refused: threading.Event = field(default_factory=threading.Event)
    taken: threading.Event = field(default_factory=threading.Event)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers = state.answers.pop(0) if state.answers else (204, {})
        if status == CUT:
            self.close_connection = True
            return
        if status == HANG:
            state.hanging.set()
            state.released.wait(60)
            return
        if status == DRIP:  # a header that never ends, a byte at a time
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 204 No Content\r\nX-Slow: ")
            with suppress(OSError):
                while not state.released.wait(0.01):
                    self.wfile.write(b"x")
            return
        if status < 300:
            state.got.append((self.headers["Content-Type"], body))
            state.taken.set()
        else:
            state.refused.set()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()
    handler = type("Running", (_Handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}/{SECRET}?key={SECRET}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        state.released.set()
        running.shutdown()
        thread.join()


class Waits:
    """Waits for nothing, and knows for how long it should have."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, is_over: Callable[[], bool], seconds: float) -> bool:
        self.seconds.append(seconds)
        return is_over()


def hook(server: Server, waits: Waits | None = None, **config: Any) -> Webhook:
    config.setdefault("events", ("start", "step", "checkpoint", "preview", "validation", "end"))
    options = WebhookConfig(url=SecretStr(server.url), **config)
    [address] = addresses([options])
    return Webhook(address, options, "cats", wait=waits or Waits(), timeout=20, now=lambda: AT)


def test_events_arrive_in_their_order(server: Server) -> None:
    one = hook(server)
    for step in range(5):
        one.tell(Event("checkpoint", {"step": step}))
    one.tell(Event("error", {}))  # not asked for
    assert one.close() is None
    wanted = {"event": "checkpoint", "run": "cats", "time": "2026-01-02T03:04:05+00:00"}
    assert server.events() == [{**wanted, "step": step} for step in range(5)]
    assert {kind for kind, _ in server.got} == {"application/json"}


def test_of_steps_only_every_so_many(server: Server) -> None:
    one = hook(server, step_interval=3)
    for step in range(1, 10):
        one.tell(Event("step", {"step": step, "loss": 0.5}))
    assert one.close() is None
    assert [event["step"] for event in server.events()] == [3, 6, 9]


@pytest.mark.parametrize("refusal", [500, 503, 429, 408, CUT])
def test_what_passes_is_tried_again(server: Server, refusal: int) -> None:
    server.answers = [(refusal, {}), (refusal, {})]
    waits = Waits()
    one = hook(server, waits)
    one.tell(Event("end", {}))
    assert one.close() is None
    assert waits.seconds == list(PAUSES[:2])
    assert len(server.got) == 1


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7.0), ("1.5", 1.5), ("9999", 60.0)])
def test_a_server_may_ask_for_a_pause(server: Server, asked: str, seconds: float) -> None:
    server.answers = [(429, {"Retry-After": asked})]
    waits = Waits()
    one = hook(server, waits)
    one.tell(Event("end", {}))
    assert one.close() is None
    assert waits.seconds == [seconds]


@pytest.mark.parametrize("asked", ["Fri, 31 Dec 1999 23:59:59 GMT", "soon", "nan"])
def test_a_pause_that_is_not_understood_is_the_usual_one(server: Server, asked: str) -> None:
    server.answers = [(429, {"Retry-After": asked})]
    waits = Waits()
    one = hook(server, waits)
    one.tell(Event("end", {}))
    assert one.close() is None
    assert waits.seconds == [PAUSES[0]]


@pytest.mark.parametrize(
    ("status", "tries"), [(400, 1), (401, 1), (404, 1), (302, 1), (500, len(PAUSES) + 1)]
)
def test_what_is_refused_is_counted_and_the_rest_goes_on(
    server: Server, status: int, tries: int
) -> None:
    """A redirect is a refusal: an event goes nowhere that nobody has written down."""
    server.answers = [(status, {"Location": server.url})] * tries
    one = hook(server)
    one.tell(Event("start", {}))
    one.tell(Event("end", {}))
    said = one.close()
    assert said == f"1 of 2 events did not reach webhook 1 (127.0.0.1) (1: HTTP {status})."
    assert [event["event"] for event in server.events()] == ["end"]


def test_a_server_that_hangs_blocks_nothing(server: Server) -> None:
    """Telling returns at once, the queue is bounded, and the end does not wait for ever."""
    server.answers = [(HANG, {})]
    one = hook(server)
    one.tell(Event("step", {"step": 100}))
    assert server.hanging.wait(30)
    for _ in range(QUEUE_LENGTH + 5):
        one.tell(Event("checkpoint", {"step": 1}))
    said = one.close(patience=0)
    total = QUEUE_LENGTH + 6
    reasons = f"{QUEUE_LENGTH + 1}: the end came first, 5: too many waited"
    assert said == f"{total} of {total} events did not reach webhook 1 (127.0.0.1) ({reasons})."


def test_files_that_wait_are_bounded_by_their_size(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "QUEUE_BYTES", 100)
    server.answers = [(HANG, {})]
    one = hook(server)
    one.tell(Event("validation", {}, (EventFile("a.png", b"x" * 150),)))  # alone it may be larger
    assert server.hanging.wait(30)
    one.tell(Event("validation", {}, (EventFile("a.png", b"x"),)))
    one.tell(Event("end", {}))
    server.released.set()
    said = one.close()
    assert said is not None
    assert said.startswith("1 of 3 events")  # what carries no file is never dropped for its size
    assert "too many waited" in said


def _held_up(server: Server) -> Webhook:
    """A webhook whose server hangs with an event that was told before all others."""
    server.answers = [(HANG, {})]
    one = hook(server)
    one.tell(Event("start", {}))
    assert server.hanging.wait(30)
    return one


def _names(server: Server) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in server.events()]


def test_where_too_many_wait_previews_go_first_and_the_oldest_of_them(server: Server) -> None:
    one = _held_up(server)
    for number in range(QUEUE_LENGTH + 3):
        one.tell(Event("preview", {"step": number}))
    for number in range(QUEUE_LENGTH - 2):
        one.tell(Event("checkpoint", {"step": number}))
    one.tell(Event("end", {"step": 9}))
    server.released.set()
    said = one.close()
    # The connection that hung is cut, and tried again: it was told in the end.
    [first, *rest] = server.events()
    assert first["event"] == "start"
    told = [(event["event"], event["step"]) for event in rest]
    checkpoints = [("checkpoint", number) for number in range(QUEUE_LENGTH - 2)]
    assert told == [*checkpoints, ("end", 9), ("preview", QUEUE_LENGTH + 2)]
    assert said is not None
    assert f"({QUEUE_LENGTH + 2}: too many waited)" in said


def test_an_end_is_told_whatever_waits(server: Server) -> None:
    """What is worth as much as what comes stays, and comes first."""
    one = _held_up(server)
    one.tell(Event("step", {"step": 100}))
    for number in range(QUEUE_LENGTH - 1):
        one.tell(Event("checkpoint", {"step": number}))
    one.tell(Event("preview", {"step": 1}))  # worth less than all
    one.tell(Event("validation", {"step": 2}))  # instead of the step
    one.tell(Event("validation", {"step": 3}))
    one.tell(Event("end", {"step": 4}))  # instead of the oldest checkpoint
    server.released.set()
    assert "4: too many waited" in (one.close() or "")
    del server.got[0]
    checkpoints = [("checkpoint", number) for number in range(1, QUEUE_LENGTH - 1)]
    assert _names(server) == [*checkpoints, ("validation", 2), ("end", 4)]


def _pausing(server: Server, seconds: int) -> Webhook:
    """A webhook that really waits, of which the server has just refused a preview for so long."""
    server.answers = [(429, {"Retry-After": str(seconds)})]
    events = ("preview", "checkpoint", "end")
    config = WebhookConfig(url=SecretStr(server.url), events=events)
    [address] = addresses([config])
    one = Webhook(address, config, "cats", timeout=20)
    one.tell(Event("preview", {"step": 1}))
    assert server.refused.wait(30)
    return one


def test_a_preview_that_waits_gives_way_to_what_is_worth_more(server: Server) -> None:
    """To it alone: previews that came before that are sent after it."""
    one = _pausing(server, 60)
    one.tell(Event("preview", {"step": 2}))
    one.tell(Event("checkpoint", {"step": 3}))
    assert server.taken.wait(30)
    said = one.close()
    assert _names(server) == [("checkpoint", 3), ("preview", 2)]
    assert said == "1 of 3 events did not reach webhook 1 (127.0.0.1) (1: HTTP 429)."


def test_a_preview_that_waits_does_not_cost_the_end_its_delivery(server: Server) -> None:
    one = _pausing(server, 60)
    one.tell(Event("end", {"step": 3}))
    said = one.close(patience=30)
    assert _names(server) == [("end", 3)]
    assert said == "1 of 2 events did not reach webhook 1 (127.0.0.1) (1: HTTP 429)."


def test_a_preview_is_not_waited_for_at_the_end(server: Server) -> None:
    one = _pausing(server, 2)
    said = one.close(patience=30)
    assert said == "1 of 1 events did not reach webhook 1 (127.0.0.1) (1: HTTP 429)."


def test_a_preview_is_tried_again_where_only_previews_wait(server: Server) -> None:
    one = _pausing(server, 0)
    one.tell(Event("preview", {"step": 2}))
    assert server.taken.wait(30)
    assert one.close() is None
    assert _names(server) == [("preview", 1), ("preview", 2)]


def test_files_of_previews_make_room_for_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "QUEUE_BYTES", 100)
    one = _held_up(server)
    picture = (EventFile("a.png", b"x" * 40),)
    one.tell(Event("step", {"step": 100}))  # without files it makes no room
    for number in range(3):
        one.tell(Event("preview", {"step": number}, picture))
    one.tell(Event("validation", {"step": 5}, (EventFile("a.png", b"x" * 70),)))
    one.tell(Event("validation", {"step": 6}, (EventFile("a.png", b"x" * 70),)))
    server.released.set()
    assert "4: too many waited" in (one.close() or "")
    sent = [
        json.loads(body)
        if kind == "application/json"
        else json.loads(parts(kind, body)[0].get_payload(decode=True))  # type: ignore[arg-type]
        for kind, body in server.got
    ]
    assert [(e["event"], e.get("step")) for e in sent] == [
        ("start", None), ("step", 100), ("validation", 5)
    ]  # fmt: skip


def test_no_answer_in_time(server: Server) -> None:
    server.answers = [(HANG, {})]
    answer = webhooks.post(Address(server.url, "one"), webhooks.Message(b"{}", "x/y"), 0.05)
    assert (answer.why, answer.again) == ("no answer within 0.05 s", True)


def test_an_answer_that_drips_is_none_in_time(server: Server) -> None:
    """Each of its bytes comes in time, and the whole never would."""
    server.answers = [(DRIP, {})]
    answer = webhooks.post(Address(server.url, "one"), webhooks.Message(b"{}", "x/y"), 0.2)
    assert (answer.why, answer.again) == ("no answer within 0.2 s", True)


def test_nobody_listens(server: Server) -> None:
    server.released.set()
    options = WebhookConfig(url=SecretStr(f"http://127.0.0.1:9/{SECRET}"))
    [one] = webhooks.opened([options], "cats")
    one._wait = Waits()
    one.tell(Event("end", {}))
    [said] = webhooks.close([one])
    assert said.endswith("(1: connection refused).")


def parts(kind: str, body: bytes) -> list[Mail]:
    """The parts of a multipart body, read by Python's own parser."""
    mail = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    assert mail.is_multipart()
    return [part for part in mail.walk() if not part.is_multipart()]


def test_an_event_with_pictures(server: Server) -> None:
    pictures = (EventFile("a cat.png", b"\x89PNG\r\n\x00--"), EventFile('"\r\nx.png', b""))
    one = hook(server)
    one.tell(Event("validation", {"step": 5}, pictures))
    assert one.close() is None
    found = parts(*server.got[0])
    names = [part.get_param("name", header="content-disposition") for part in found]
    assert names == ["event", "file0", "file1"]
    assert [part.get_filename() for part in found] == [None, "a cat.png", "___x.png"]
    assert json.loads(found[0].get_payload(decode=True))["step"] == 5  # type: ignore[arg-type]
    assert found[1].get_payload(decode=True) == pictures[0].content
    assert found[1].get_content_type() == "image/png"


def test_files_that_are_too_large_for_the_server_are_left_out(server: Server) -> None:
    server.answers = [(413, {})]
    one = hook(server)
    one.tell(Event("validation", {"step": 5}, (EventFile("a.png", b"x"),)))
    assert one.close() is None
    assert json.loads(server.got[-1][1])["step"] == 5


def test_discord(server: Server) -> None:
    """A line of text that calls nobody; pictures beside it."""
    one = hook(server, form="discord")
    one.tell(Event("step", {"step": 100, "total_steps": 200, "loss": 0.25, "learning_rate": 1e-4}))
    one.tell(Event("validation", {"step": 5}, (EventFile("a.png", b"1"),)))
    one.tell(Event("end", {"message": "@everyone " + "x" * 3000}))
    shown = {"step": 5, "picture": "a-32x32", "inference_step": 3, "num_inference_steps": 20}
    one.tell(Event("preview", shown, (EventFile("a.png", b"1"),)))
    assert one.close() is None
    first = json.loads(server.got[0][1])
    assert first == {
        "content": "**cats** step · step 100 · of 200 · loss 0.25 · lr 1.0e-04",
        "allowed_mentions": {"parse": []},
    }
    found = parts(*server.got[1])
    names = [part.get_param("name", header="content-disposition") for part in found]
    assert names == ["payload_json", "files[0]"]
    assert len(json.loads(server.got[2][1])["content"]) == 2000
    text = json.loads(parts(*server.got[3])[0].get_payload(decode=True))  # type: ignore[arg-type]
    assert text["content"] == "**cats** preview · step 5 · a-32x32 · drawn 3 · of 20"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event("validation", {"step": 5, "drawn": 0, "failed": 8}), "step 5 · 0 drawn · 8 failed"),
        (Event("validation", {"step": 5, "drawn": 2, "failed": 0}), "step 5 · 2 drawn"),
        (Event("end", {"step": 40, "loss": 0.5, "failed": False, "signal": None}), "step 40"),
        (Event("end", {"step": 40, "failed": True, "signal": None}), "step 40 · failed"),
        (Event("end", {"step": 40, "signal": 15}), "step 40 · stopped by SIGTERM"),
    ],
)
def test_discord_tells_what_went_wrong(event: Event, text: str) -> None:
    posted = webhooks.message(event, "discord", "cats", datetime.now(timezone.utc))
    said = json.loads(posted.body)["content"]
    assert said.removesuffix(" · loss 0.5") == f"**cats** {event.name} · {text}"


def test_only_the_time_to_send_grows_with_a_body(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a slow line takes for a picture is no reason to give it up. A host that cannot be
    reached, or does not answer, is given up as soon as without it."""
    reaching, sending = [], []
    connect, send = socket.create_connection, http.client.HTTPConnection.send

    def connecting(place: Any, timeout: float, *rest: Any) -> socket.socket:
        reaching.append(timeout)
        return connect(place, timeout, *rest)

    def noting(connection: http.client.HTTPConnection, data: Any) -> None:
        send(connection, data)
        sending.append(connection.sock.gettimeout())

    monkeypatch.setattr(socket, "create_connection", connecting)
    monkeypatch.setattr(http.client.HTTPConnection, "send", noting)
    server.answers = [(HANG, {})]
    body = b"x" * 5_000_000
    answer = webhooks.post(Address(server.url, "one"), webhooks.Message(body, "x/y"), 2.0)
    assert answer == webhooks.Answer("no answer within 2 s", again=True)
    assert reaching == [2.0]
    assert set(sending) == {102.0}


def test_numbers_that_json_cannot_say() -> None:
    told: list[Event] = []
    Events([told.append]).send("step", loss=float("nan"), by={"t": [float("inf"), 1.0]})
    assert told == [Event("step", {"loss": None, "by": {"t": [None, 1.0]}})]


@pytest.mark.parametrize(
    "text",
    ["ftp://host/x", "host", "https:///x", "https://a:b@host/", "https://host:x/", "https://h/ x"],
)
def test_what_is_no_address_is_not_shown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HOOK", f"{text}{SECRET}")
    for config in (WebhookConfig(url=SecretStr(f"{text}{SECRET}")), WebhookConfig(url_env="HOOK")):
        with pytest.raises(UsageError, match="webhook") as caught:
            addresses([config])
        assert SECRET not in str(caught.value)


def test_an_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(UsageError, match="HOOK"):
        addresses([WebhookConfig(url_env="HOOK")])
    monkeypatch.setenv("HOOK", f"https://host.test/{SECRET}")
    [address] = addresses([WebhookConfig(url_env="HOOK")])
    assert address.url == f"https://host.test/{SECRET}"
    assert SECRET not in repr(address) + address.label


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("hooks.example.com", "example.com"),
        (f"{SECRET}.m.example.net.", "example.net"),
        ("localhost:8080", "localhost"),
        ("192.0.2.17:80", "192.0.2.17"),
        ("[2001:db8::1]:80", "2001:db8::1"),
    ],
)
def test_of_a_host_only_the_end_of_its_name_is_shown(host: str, shown: str) -> None:
    [address] = addresses([WebhookConfig(url=SecretStr(f"https://{host}/{SECRET}"))])
    assert address.label == f"webhook 1 ({shown})"


def test_a_host_that_cannot_be_one_kills_no_thread() -> None:
    answer = webhooks.post(
        Address(f"http://{'a' * 80}.test/{SECRET}", "one"), webhooks.Message(b"", "")
    )
    assert answer.why is not None
    assert SECRET not in answer.why
