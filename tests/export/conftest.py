"""An adapter to export, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import write_adapter


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Path:
    """An adapter file for the small model. Do not change it."""
    return write_adapter(small_omnigen, tmp_path_factory.mktemp("adapter") / "a.safetensors")
