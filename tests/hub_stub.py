"""The hub as an HTTP server on this machine: as much of it as downloading files takes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from blake3 import blake3

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository; `kind` is `datasets/` for a dataset and empty for a model."""

    repository: str
    kind: str
    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.requests.append(f"{self.command} {path}")
        api = f"/api/{self.kind or 'models/'}{self.repository}"
        resolve = f"/{self.kind}{self.repository}/resolve/{COMMIT}/"
        headers = {"X-Repo-Commit": COMMIT}
        siblings = [{"rfilename": name} for name in self.files]
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            listing = {"id": self.repository, "sha": COMMIT, "siblings": siblings}
            body = json.dumps(listing).encode()
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in self.files.items()
            ]
            body = json.dumps(tree).encode()
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            body = self.files[path.removeprefix(resolve)]
            headers["ETag"] = f'"{_blob_id(body)}"'
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _blob_id(content: bytes) -> str:
    return str(blake3(content).hexdigest()[:40])


@contextmanager
def serve(repository: str, kind: str = "") -> Iterator[tuple[str, type[Hub]]]:
    """Address and handler of a running hub; fill the handler's `files`."""
    members = {"repository": repository, "kind": kind, "files": {}, "requests": []}
    handler = type("RunningHub", (Hub,), members)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that shall use the hub at `endpoint` and a cache of its own."""
    names = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
