"""Where an adapter comes from, as its file says: the step, and the base that it was trained on.

Any two OmniGens have the same shapes, so an adapter of one fits the other: only what its file says
tells them apart. Files of other programs, and those of this one before, say nothing. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from manifests.errors import PipeError, UsageError

#: Hex digits of a hash that a person is shown.
_SHORT = 16


@dataclass(frozen=True)
class Provenance:
    """What is known of an adapter's file: its name, the BLAKE3 of its bytes, and what it says
    itself, which is None where it does not: step, name of the base, and key of its weights."""

    file: str
    blake3: str
    step: str | None
    base: str | None
    transformer_key: str | None

    @property
    def label(self) -> str:
        """Name, step and the beginning of the hash, for a person: every run's adapter has the same
        name."""
        step = f"step {self.step}, " if self.step is not None else ""
        return f"{self.file} ({step}BLAKE3 {self.blake3[:_SHORT]})"

    def as_text(self) -> dict[str, str]:
        """The same for the text chunks of a picture."""
        step = {"adapter_step": self.step} if self.step is not None else {}
        return {"adapter": self.file, **step, "adapter_blake3": self.blake3[:_SHORT]}

    def mismatch(self, label: str, transformer_key: str) -> str | None:
        """A sentence where it was trained on other weights than the model `label` has, whose key
        (of `weights.weights_key`) is `transformer_key`; None where not, or where it does not say.
        """
        if self.transformer_key in (None, transformer_key):
            return None
        return (
            f"The adapter {self.label} was trained on other weights than {label} has: on "
            f"those of {self.base or 'another model'} at that time."
        )


def read_provenance(path: Path) -> Provenance:
    """Where the adapter file `path` comes from; raises as `read_metadata` does."""
    said = read_metadata(path)
    digest = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    return _provenance(path.name, digest, said)


def provenance_of(name: str, file: bytes, said: Mapping[str, str]) -> Provenance:
    """The same of an adapter that would be the file `name`, of these bytes and with `said` as its
    metadata, if it were written."""
    return _provenance(name, blake3(file, max_threads=blake3.AUTO).hexdigest(), said)


def _provenance(name: str, digest: str, said: Mapping[str, str]) -> Provenance:
    return Provenance(name, digest, said.get("step"), said.get("base"), said.get("transformer_key"))


def read_metadata(path: Path) -> dict[str, str]:
    """What an adapter file says beside its tensors; raises `UsageError` where there is no such
    file, and `PipeError` where it is damaged."""
    try:
        with safe_open(path, framework="np") as handle:
            return handle.metadata() or {}
    except FileNotFoundError as error:
        raise UsageError(f"There is no adapter {path}.") from error
    except (SafetensorError, OSError) as error:
        raise PipeError(f"{path} is not a whole safetensors file: {error}") from error
