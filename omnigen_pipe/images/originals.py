"""Originals: files that discover has read, looked up by their content."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from manifests.errors import PipeError
from manifests.keys import KEY_DIGITS


class ChangedSourceError(PipeError):
    """No file holds the bytes that discover saw: nothing is known of this image's content.

    `faults` says of each of its files what is wrong with it.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def read_original(paths: Iterable[Path], content_hash: str) -> bytes:
    """The bytes with this BLAKE3 (first 128 bits, hex), from the first of `paths` that holds them.

    Raises `ChangedSourceError` where none does.
    """
    faults = []
    for path in dict.fromkeys(paths):
        try:
            data = path.read_bytes()
        except OSError as error:
            faults.append(f"{path}: {error.strerror or error}")
            continue
        if blake3(data).hexdigest()[:KEY_DIGITS] == content_hash:
            return data
        faults.append(f"{path}: it has changed")
    raise ChangedSourceError(faults)
