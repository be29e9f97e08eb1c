"""What several test modules need: the shared photographs and a small model, built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: the models here are too small for more than one thread, the
# same number everywhere makes losses equal to the last bit, and no test asks the real hub.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs whose names are captions; skips where it is absent."""
    folder = SHARED / "photos"
    if not folder.is_dir():
        pytest.skip(f"the photographs are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def phi3_tokenizer() -> Path:
    """The real Phi-3-mini tokenizer's folder; skips where it is absent."""
    folder = SHARED / "tokenizer" / "phi-3-mini"
    if not folder.is_dir():
        pytest.skip(f"the Phi-3-mini tokenizer is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_omnigen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OmniGen with random weights in diffusers' folder layout. Do not change it."""
    from small_omnigen import build_small_omnigen

    return build_small_omnigen(tmp_path_factory.mktemp("model") / "omnigen")
