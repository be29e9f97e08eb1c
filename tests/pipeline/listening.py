"""A webhook's server on this machine, for the tests of whole runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Part of every address: it may be shown nowhere.
SECRET = "the-path-is-secret"
#: Instead of a status: never to answer.
HANG = -1


def event_of(media_type: str, body: bytes) -> dict[str, Any]:
    """What was posted; the files of a multipart one by their names, as `files`."""
    if media_type == "application/json":
        return dict(json.loads(body))
    whole = message_from_bytes(f"Content-Type: {media_type}\r\n\r\n".encode() + body)
    said, *files = [part for part in whole.walk() if not part.is_multipart()]
    content = {file.get_filename(): file.get_payload(decode=True) for file in files}
    return {**json.loads(str(said.get_payload())), "files": content}


@contextmanager
def listener(status: int = 204) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The secret address of a webhook that answers `status` or hangs, and the events that it was
    sent."""
    got: list[dict[str, Any]] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(event_of(self.headers["Content-Type"], body))
            if status == HANG:
                released.wait(60)
                return
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/{SECRET}", got
        released.set()
        running.shutdown()
        thread.join()
