"""Files from the Hugging Face hub, through huggingface_hub's cache.

HF_ENDPOINT (a mirror), HF_HOME (where the cache lies), HF_HUB_OFFLINE and the login are
huggingface_hub's own. Whatever goes wrong becomes one message that says what to check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from manifests.errors import UsageError


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
            f"{what} could not be fetched from the hub: {str(error).splitlines()[0].rstrip('.')}. "
            "Check the name, the network (HF_ENDPOINT for a mirror) and, for gated or private "
            "repositories, the login (`hf auth login`)."
        ) from error


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
