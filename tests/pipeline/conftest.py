"""Whole workspaces for the tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_project import Project, toml_text


@pytest.fixture
def project(tmp_path: Path, small_omnigen: Path) -> Callable[..., Project]:
    """Makes a workspace: `project(images_folder, dataset={...}, train={...})`."""

    def make(
        images: Path | str,
        dataset: dict[str, object] | None = None,
        train: dict[str, object] | None = None,
        extra: str = "",
    ) -> Project:
        root = tmp_path / "workspace"
        root.mkdir(exist_ok=True)
        dataset_options = {
            "id": "main",
            "instance_data_dir": str(images),
            "resolution": 64,
            "aspect_bucket_alignment": 16,
            **(dataset or {}),
        }
        train_options = {
            "max_train_steps": 4,
            "train_batch_size": 2,
            "lr_warmup_steps": 0,
            "report_to": "none",
            **(train or {}),
        }
        lines = ["[model]", f"pretrained_model_name_or_path = {toml_text(str(small_omnigen))}"]
        lines += ["[[dataset]]"]
        lines += [f"{key} = {toml_text(value)}" for key, value in dataset_options.items()]
        lines += ["[train]"]
        lines += [f"{key} = {toml_text(value)}" for key, value in train_options.items()]
        (root / "omnigen-pipe.toml").write_text("\n".join([*lines, extra, ""]), encoding="utf-8")
        return Project(root)

    return make
