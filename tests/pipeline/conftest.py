"""Whole workspaces for the tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pipeline_project import Project, configured


@pytest.fixture
def project(tmp_path: Path, small_omnigen: Path) -> Callable[..., Project]:
    """Makes a workspace: `project(images_folder, dataset={...}, train={...})`."""
    return partial(configured, tmp_path / "workspace", small_omnigen)
