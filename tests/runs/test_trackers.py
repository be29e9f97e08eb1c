"""Trackers: the real wandb, offline, where it is installed; and what is said where it is not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from PIL import Image

from manifests.errors import UsageError
from omnigen_pipe.runs import trackers


def test_wandb_offline_keeps_pictures_and_its_id_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The picture's file to the byte; and it prints nothing."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    folder, picture = tmp_path / "run", tmp_path / "a.png"
    folder.mkdir()
    Image.radial_gradient("L").convert("RGB").save(picture)
    for done in (0, 2):
        (tracker,) = trackers.opened("wandb", folder, tmp_path / "staging", done, "project", print)
        tracker.describe({"train": {"seed": done}}, {"samples": {"train": 1}})
        tracker.scalars(done + 1, {"train/loss": 1.0})
        tracker.picture(done + 1, "validation/a-8x8", picture, "a")
        tracker.close(False)
    kept = list(folder.glob("wandb/offline-run-*/files/media/images/validation/*.png"))
    assert [path.read_bytes() for path in kept] == [picture.read_bytes()] * 2
    assert len({path.stem for path in folder.glob("wandb/*/run-*.wandb")}) == 1
    assert capfd.readouterr() == ("", "")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", missing)
    for report_to in ("none", "tensorboard"):
        trackers.check_trackers(report_to)
    for report_to in ("wandb", "all"):
        with pytest.raises(UsageError, match=r"pip install 'omnigen-pipe\[wandb\]'"):
            trackers.check_trackers(report_to)
