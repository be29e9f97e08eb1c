"""What PNG files say of how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omnigen_pipe.sampling.drawer import Drawer
from omnigen_pipe.sampling.metadata import grid_metadata, model_entries, picture_metadata
from omnigen_pipe.sampling.requests import Request, Settings, at_strengths, requests_of
from omnigen_pipe.sampling.source import Source


def drawer(tmp_path: Path, vae: str | None = None, adapter: bool = True) -> Drawer:
    source = Source("maker/omnigen", tmp_path, "v2", vae)
    file = None
    if adapter:
        file = tmp_path / "secret" / "adapter.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({"w": torch.ones(1)}, file, {"step": "7"})
    return Drawer(source, file, base_precision="nf4-bnb")


def test_numbers_are_written_as_they_were_used(tmp_path: Path) -> None:
    settings = Settings(guidance_scale=2.123456789)
    request = Request("x", "a", 3, 0.123456789)
    said = picture_metadata(drawer(tmp_path), "bfloat16", settings, request)
    assert float(said["guidance"]) == 2.123456789
    assert float(said["strength"]) == 0.123456789
    assert (said["precision"], said["base_model_precision"]) == ("bfloat16", "nf4-bnb")
    assert (said["model"], said["revision"]) == ("maker/omnigen", "v2")
    assert (said["adapter"], said["adapter_step"]) == ("adapter.safetensors", "7")
    assert len(said["adapter_blake3"]) == 16


@pytest.mark.parametrize("name", ["maker/vae", "own-vae"])
def test_another_vae_is_named_and_no_folder_of_this_machine(tmp_path: Path, name: str) -> None:
    vae = name
    if "/" not in name:
        (tmp_path / name).mkdir()
        vae = str(tmp_path / name)
    said = model_entries(drawer(tmp_path, vae), "float32")
    assert said["vae"] == name
    assert str(tmp_path) not in str(said)


def test_a_grid_says_the_same_as_its_pictures_together(tmp_path: Path) -> None:
    requests = at_strengths(requests_of(["a", "日本"], {}, 0, 2), [0, 1])
    settings = Settings()
    said = grid_metadata(drawer(tmp_path), "float32", settings, requests)
    listed = json.loads(said.pop("pictures"))
    for request, entry in zip(requests, listed, strict=True):
        alone = picture_metadata(drawer(tmp_path), "float32", settings, request)
        assert {name: str(value) for name, value in entry.items()} | said == alone


def test_without_an_adapter_there_is_no_strength(tmp_path: Path) -> None:
    settings, request = Settings(), Request("x", "a", 3)
    said = grid_metadata(drawer(tmp_path, adapter=False), "float32", settings, [request])
    assert json.loads(said["pictures"]) == [{"prompt": "a", "seed": 3}]
    assert "strength" not in picture_metadata(
        drawer(tmp_path, adapter=False), "float32", settings, request
    )
