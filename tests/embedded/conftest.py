"""The embedded model, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnigen_pipe.model_files import EMBEDDED_FOLDER
from omnigen_pipe.sampling.requests import Settings
from omnigen_pipe.sampling.source import Source


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Its folder, in diffusers' layout."""
    return EMBEDDED_FOLDER


@pytest.fixture(scope="session")
def source() -> Source:
    return Source("embedded", Path.cwd())


@pytest.fixture(scope="session")
def recommended(source: Source) -> Settings:
    """How it is meant to be used: its `generation.json`."""
    return source.settings()


@pytest.fixture
def pipe(source: Source) -> Any:
    """A pipeline of its own for each test, which may break it."""
    import torch

    return source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32)
