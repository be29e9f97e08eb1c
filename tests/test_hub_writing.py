"""Writing to the hub, against a server on this machine: what is refused, and what passes."""

from __future__ import annotations

from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session

from manifests.errors import PipeError, UsageError
from omnigen_pipe import hub
from writable_hub import CUT, SIGNATURE, TOKEN, State, writable_hub

REPOSITORY = "tester/adapter"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    with writable_hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield state
        close_session()


class Waits:
    """Waits for nothing, and knows for how long it should have."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_that_is_not_there_is_made(server: State, private: bool) -> None:
    assert hub.check_writable(REPOSITORY, private) == REPOSITORY
    assert server.repositories == {REPOSITORY: private}
    assert server.requests[-1] == "may_write"


def test_a_bare_name_is_one_of_the_account(server: State) -> None:
    assert hub.check_writable("adapter", False) == REPOSITORY


def test_no_login(server: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="hf auth login"):
        hub.check_writable(REPOSITORY, False)
    assert server.requests == []


def test_a_login_that_is_not_valid(server: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherTokenAltogether")
    waits = Waits()
    with pytest.raises(UsageError, match="log in again") as caught:
        hub.check_writable(REPOSITORY, False, waits)
    assert waits.seconds == []
    assert "hf_A" not in str(caught.value)


@pytest.mark.parametrize(("action", "status"), [("may_write", 403), ("may_write", 404)])
def test_a_login_that_may_not_write(server: State, action: str, status: int) -> None:
    server.refusals[action] = [status]
    with pytest.raises(UsageError, match="write access"):
        hub.check_writable(REPOSITORY, False, Waits())


@pytest.mark.parametrize("refusal", [500, 503, 429, CUT])
@pytest.mark.parametrize("action", ["whoami", "create", "may_write"])
def test_what_passes_is_tried_again(server: State, action: str, refusal: int) -> None:
    server.refusals[action] = [refusal]
    waits = Waits()
    assert hub.check_writable(REPOSITORY, False, waits) == REPOSITORY
    assert waits.seconds == [hub.PAUSES[0]]


def test_what_does_not_pass_is_given_up(server: State) -> None:
    server.refusals["whoami"] = [500] * 10
    waits = Waits()
    with pytest.raises(UsageError, match="500"):
        hub.check_writable(REPOSITORY, False, waits)
    assert waits.seconds == list(hub.PAUSES)


def test_files_arrive_as_they_are(server: State, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 40
    (tmp_path / "w").write_bytes(weights)
    files = {"adapter.safetensors": tmp_path / "w", "README.md": b"---\nlicense: mit\n---\n# A\n"}
    address = hub.upload(REPOSITORY, files, "step 3")
    assert address.startswith(f"{server.endpoint}/{REPOSITORY}/commit/")
    assert server.files == {"adapter.safetensors": weights, "README.md": files["README.md"]}
    assert server.commits == ["step 3"]


@pytest.mark.parametrize("refusal", [500, CUT])
def test_a_commit_that_fails_once(server: State, refusal: int) -> None:
    server.refusals["commit"] = [refusal]
    waits = Waits()
    hub.upload(REPOSITORY, {"a.json": b"{}"}, "step 3", wait=waits)
    assert server.files == {"a.json": b"{}"}
    assert waits.seconds == [hub.PAUSES[0]]


def test_what_a_commit_replaces_goes_with_it_and_nothing_else(server: State) -> None:
    hub.upload(REPOSITORY, {"a/1": b"1", "a/2": b"2", "mine": b"3"}, "step 3")
    hub.upload(REPOSITORY, {"a/2": b"2", "b": b"4"}, "step 4", lambda name: name.startswith("a/"))
    assert server.files == {"a/2": b"2", "mine": b"3", "b": b"4"}
    assert server.commits == ["step 3", "step 4"]


@pytest.mark.parametrize("action", ["tree", "preupload", "batch", "store", "commit"])
def test_a_refusal_names_neither_token_nor_signature(
    server: State, action: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing of the push is there."""
    server.refusals[action] = [403]
    with pytest.raises(PipeError, match="403") as caught:
        hub.upload(REPOSITORY, {"adapter.safetensors": b"weights"}, "step 3", wait=Waits())
    said = str(caught.value) + "".join(capfd.readouterr())
    assert TOKEN not in said
    assert SIGNATURE not in said
    assert server.files == {}


def test_an_answer_that_is_not_the_hub_s_is_wrong_usage(
    server: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portal's page, or a mirror that knows no accounts."""

    def page(self: HfApi) -> None:
        raise JSONDecodeError("Expecting value", "<html>", 0)

    monkeypatch.setattr(HfApi, "whoami", page)
    with pytest.raises(UsageError, match="cannot be written to: Expecting value"):
        hub.check_writable(REPOSITORY, False)


def test_what_cannot_be_fetched_is_told_without_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    def signed(*_: object, **__: object) -> None:
        raise OSError("502 Bad Gateway for url: https://store.test/a?X-Amz-Signature=SECRET")

    monkeypatch.setattr("huggingface_hub.snapshot_download", signed)
    with pytest.raises(UsageError, match="The model could not be fetched") as caught:
        hub.fetch("ann/model", "model", None, ["*"], what="The model")
    assert "https://store.test/a" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_plain_takes_secrets_out() -> None:
    error = OSError(f"403 for url 'https://a.b/c?X-Sig=s3cret&n=1' with Bearer {TOKEN}.\nmore")
    assert hub.plain(error) == "403 for url 'https://a.b/c' with Bearer hf_…"
