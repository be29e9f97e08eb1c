"""Files from the Hugging Face hub, through huggingface_hub's cache, and files to it.

HF_ENDPOINT (a mirror), HF_HOME (where the cache lies), HF_HUB_OFFLINE and the login are
huggingface_hub's own. Whatever goes wrong becomes one message that says what to check, and that
holds neither a token nor the signature of an address.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from manifests.errors import PipeError, UsageError

#: Seconds between the tries of a request that changes the hub.
PAUSES = (2.0, 8.0, 30.0)
_Result = TypeVar("_Result")


def errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a repository cannot be had."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # Since 1.0 its HTTP library's own errors pass through, under this name.
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    except ImportError:
        return (HfHubHTTPError, HFValidationError, OSError)
    return (HTTPError, HFValidationError, OSError)


def fetch(
    repository: str,
    kind: Literal["model", "dataset"],
    revision: str | None,
    patterns: list[str],
    *,
    what: str,
    refresh: bool = True,
) -> Path:
    """The local snapshot of `repository` with the files that match `patterns`.

    With `refresh` the hub is asked for the newest state of the revision and what is missing is
    downloaded (without a network, what the cache holds serves); without, the cache is used as
    it is where it has anything. Raises `UsageError`, beginning with `what`, where neither
    gives the repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=local,
        )
        return Path(folder)

    try:
        if not refresh:
            try:
                return snapshot(local=True)
            except LocalEntryNotFoundError:
                pass  # not in the cache yet
        return snapshot(local=False)
    except errors() as error:
        raise UsageError(
            f"{what} could not be fetched from the hub: {plain(error)}. "
            "Check the name, the network (HF_ENDPOINT for a mirror) and, for gated or private "
            "repositories, the login (`hf auth login`)."
        ) from None  # its own text may hold what `plain` leaves out


def cached(
    repository: str, kind: Literal["model", "dataset"], revision: str | None, patterns: list[str]
) -> Path | None:
    """The snapshot of `repository` in the cache, as it is; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=True,
        )
    except errors():
        return None
    return Path(folder)


def check_writable(
    repository: str, private: bool, wait: Callable[[float], object] = time.sleep
) -> str:
    """Make sure that the login may write to the model `repository`; returns its OWNER/NAME.

    It is made where it is not there, with `private` as a private one: only that shows whether it
    can be. Raises `UsageError`, saying what to do, where it cannot be written to.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError(
            "push_to_hub is set, and there is no login to the hub. Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write, or set push_to_hub = false."
        )
    api = HfApi()

    def check() -> str:
        account = str(api.whoami()["name"])
        full = repository if "/" in repository else f"{account}/{repository}"
        api.create_repo(full, private=private or None, exist_ok=True)
        api.auth_check(full, write=True)
        return full

    # ValueErrors are the library's own, of answers that are not the hub's.
    refusals: tuple[type[Exception], ...] = (*errors(), ValueError)
    try:
        with _quiet():
            return _tried(check, wait)
    except refusals as error:
        raise UsageError(
            f"push_to_hub is set, and {repository} on the hub cannot be written to: "
            f"{plain(error)}. {_remedy(error)}"
        ) from None  # its own text may hold what `plain` leaves out


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    is_replaced: Callable[[str], bool] = lambda name: False,
    wait: Callable[[float], object] = time.sleep,
) -> str:
    """Commit `files`, by their paths there, to the model `repository`, all or none; returns the
    commit's address.

    Files that are there already and equal are not sent again. Those that are there, not in `files`,
    and of which `is_replaced` says so by their path, are deleted in the same commit. Raises
    `PipeError` where it cannot be done, also after some tries.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    def commit() -> str:
        api = HfApi()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
            for name, file in files.items()
        ]
        operations += [
            CommitOperationDelete(name, is_folder=False)
            for name in api.list_repo_files(repository)
            if name not in files and is_replaced(name)
        ]
        try:
            done = api.create_commit(repository, operations, commit_message=message)
        except RuntimeError as error:  # what sending a large file raises is wrapped in one
            if isinstance(error.__cause__, errors()):
                raise error.__cause__ from None
            raise
        return str(done.commit_url)

    # ValueErrors are the library's own, of what the hub answers and of the card; RuntimeErrors come
    # from Xet, by which it sends large files.
    refusals: tuple[type[Exception], ...] = (*errors(), ValueError, RuntimeError)
    try:
        with _quiet():
            return _tried(commit, wait)
    except refusals as error:
        raise PipeError(
            f"{repository} on the hub could not be written to: {plain(error)}. {_remedy(error)}"
        ) from None  # its own text may hold what `plain` leaves out


def _tried(function: Callable[[], _Result], wait: Callable[[float], object]) -> _Result:
    """What `function` returns, tried again where the hub or the network fails for the moment."""
    for pause in PAUSES:
        try:
            return function()
        except errors() as error:
            if not _passing(error):
                raise
        wait(pause)
    return function()


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return int(status) if status is not None else None


def _passing(error: Exception) -> bool:
    """Whether it may go well another time: the hub's own fault, its limit, or the network."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, (HFValidationError, OfflineModeIsEnabled, FileNotFoundError))


def plain(error: Exception) -> str:
    """The first line of what the hub said, without tokens and without what follows the `?` of an
    address, which may be its signature."""
    text = (str(error).splitlines() or [""])[0]
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    text = re.sub(r"hf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+", "hf_…", text)
    return text.rstrip(". ") or type(error).__name__


def _remedy(error: Exception) -> str:
    status = _status(error)
    if status == 401:
        return "The login is not valid: log in again with `hf auth login`, or renew HF_TOKEN."
    if status in (403, 404):
        return (
            "The login must be one that may write there: take a token with write access, and check "
            "hub_model_id."
        )
    return "Check the name, the network (HF_ENDPOINT for a mirror) and the login (`hf auth login`)."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own bars and warnings, which name signed addresses."""
    import logging as levels

    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = logging.get_verbosity()
    logging.set_verbosity(levels.CRITICAL)
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            enable_progress_bars()
