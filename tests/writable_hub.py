"""The hub as an HTTP server on this machine that can be written to: what a push takes of it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_WritesToTheStubOfTheHub"
ACCOUNT = "tester"
#: A signature in the address that large files are sent to.
SIGNATURE = "SignedForThisUploadOnly"
#: Instead of a status: the connection ends without an answer.
CUT = 0


@dataclass
class State:
    """What the server knows: repositories (private or not), their files, and commit messages."""

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    #: How the next requests of an action are refused, by its name.
    refusals: dict[str, list[int]] = field(default_factory=dict)
    #: What requests of an action wait for before they are answered, by its name.
    gates: dict[str, threading.Event] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.act()

    def do_POST(self) -> None:
        self.act()

    def do_PUT(self) -> None:
        self.act()

    def act(self) -> None:
        path = unquote(self.path.split("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/agent-harnesses":  # of the library's own, once in a process
            self.answer(404, {"error": "Not found"})
            return
        name = _action(self.command, path)
        self.state.requests.append(name)
        if name in self.state.gates:
            self.state.gates[name].wait(60)
        refusals = self.state.refusals.get(name, [])
        if refusals:
            status = refusals.pop(0)
            if status == CUT:
                self.close_connection = True
                return
            self.answer(status, {"error": "refused"})
        elif name != "store" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            self.answer(200, getattr(self, f"on_{name}")(path, body))

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def on_whoami(self, path: str, body: bytes) -> Any:
        return {"name": ACCOUNT, "type": "user"}

    def on_create(self, path: str, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.state.repositories.setdefault(name, asked.get("visibility") == "private")
        return {"url": f"{self.state.endpoint}/{name}", "name": name}

    def on_may_write(self, path: str, body: bytes) -> Any:
        return {}

    def on_yaml(self, path: str, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def on_tree(self, path: str, body: bytes) -> Any:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.state.files.items()
        ]

    def on_preupload(self, path: str, body: bytes) -> Any:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        return {"files": modes}

    def on_batch(self, path: str, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        place = f"{self.state.endpoint}/store"
        return {
            "transfer": "basic",
            "objects": [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {
                        "upload": {"href": f"{place}/{one['oid']}?X-Signature={SIGNATURE}"}
                    },
                }
                for one in objects
            ],
        }

    def on_store(self, path: str, body: bytes) -> Any:
        self.state.stored[path.rsplit("/", 1)[-1]] = body
        return {}

    def on_commit(self, path: str, body: bytes) -> Any:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.state.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.state.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.state.files[value["path"]] = self.state.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del self.state.files[value["path"]]
            else:
                raise AssertionError(f"the stub knows no {entry['key']}")
        number = len(self.state.commits)
        repository = path.removeprefix("/api/models/").split("/commit/")[0]
        address = f"{self.state.endpoint}/{repository}/commit/{number:040x}"
        return {"commitUrl": address, "commitOid": f"{number:040x}"}

    def log_message(self, *_: object) -> None:
        pass


def _action(command: str, path: str) -> str:
    """The name of what is asked for."""
    if path.startswith("/store/") and command == "PUT":
        return "store"
    known = {
        "whoami-v2": "whoami",
        "repos/create": "create",
        "auth-check/write": "may_write",
        "validate-yaml": "yaml",
        "tree/main": "tree",
        "preupload/main": "preupload",
        "objects/batch": "batch",
        "commit/main": "commit",
    }
    for end, name in known.items():
        if path.endswith(end):
            return name
    raise AssertionError(f"the stub knows no {command} {path}")


@contextmanager
def writable_hub() -> Iterator[State]:
    """A running hub, its address in `endpoint`."""
    state = State()
    handler = type("RunningHub", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()
