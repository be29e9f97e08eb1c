"""The VAE's key: what changes latents changes it, what does not leaves it alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.errors import UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.device import exact_float32
from omnigen_pipe.latents import vae
from omnigen_pipe.latents.vae import load_tiny, load_vae, scaling_factor, vae_key
from omnigen_pipe.workspace import Workspace
from small_tiny import build_small_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


def workspace(root: Path, **options: Any) -> Workspace:
    root.mkdir(exist_ok=True)
    return Workspace(root, parse({"vae": options}, "test"))


@pytest.fixture
def folder(small_omnigen: Path, tmp_path: Path) -> Path:
    """A copy of the small VAE that a test may change, last written long ago."""
    copy = tmp_path / "vae"
    shutil.copytree(small_omnigen / "vae", copy)
    for path in copy.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return copy


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_what_changes_latents_changes_the_key(folder: Path, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"vae_dtype": "bf16"},
        {"latent_dtype": "fp32"},
        {"vae_enable_tiling": True},
        {"vae_enable_tiling": True, "vae_tile_size": 256},
    ]
    keys = {vae_key(workspace(tmp_path / "w", **options), folder) for options in variants}
    assert len(keys) == len(variants)
    change(folder, norm_num_groups=2)
    keys.add(vae_key(workspace(tmp_path / "w"), folder))
    with (folder / WEIGHTS).open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x01")
    keys.add(vae_key(workspace(tmp_path / "w"), folder))
    assert len(keys) == len(variants) + 2


def test_what_does_not_change_latents_leaves_the_key(folder: Path, tmp_path: Path) -> None:
    key = vae_key(workspace(tmp_path / "w"), folder)
    for options in (
        {"vae_batch_size": 9},
        {"vae_enable_slicing": True},
        {"vae_tile_size": 256},
        {"decode_workers": 3, "shard_size_mb": 1, "shard_seconds": 5},
    ):
        assert vae_key(workspace(tmp_path / "w", **options), folder) == key
    change(folder, _diffusers_version="99", _name_or_path="elsewhere")
    assert vae_key(workspace(tmp_path / "w"), folder) == key
    moved = folder.rename(tmp_path / "moved")
    (moved / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not loaded")
    assert vae_key(workspace(tmp_path / "other"), moved) == key


def test_weights_are_hashed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = workspace(tmp_path / "w")
    key = vae_key(place, folder)
    memory = place.root / "manifests" / "weights.json"
    assert memory.is_file()

    class Refused:
        AUTO = 0

        def __init__(self, **_: object) -> None:
            raise AssertionError("the weights were hashed again")

    monkeypatch.setattr(blake3, "blake3", Refused)
    assert vae_key(place, folder) == key
    os.utime(folder / WEIGHTS, (1_700_000_001, 1_700_000_001))
    with pytest.raises(AssertionError, match="hashed again"):
        vae_key(place, folder)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"x": 1}', b"\xff\xfe", b"null"])
def test_damaged_memory_is_harmless(folder: Path, tmp_path: Path, damage: bytes) -> None:
    place = workspace(tmp_path / "w")
    key = vae_key(place, folder)
    memory = place.root / "manifests" / "weights.json"
    memory.write_bytes(damage)
    assert vae_key(place, folder) == key
    wrong = {str((folder / WEIGHTS).resolve()): [1, 2, "0" * 64]}
    memory.write_text(json.dumps(wrong))
    assert vae_key(place, folder) == key


def test_fresh_weights_are_not_remembered(folder: Path, tmp_path: Path) -> None:
    # Written again within the resolution of mtime, they would keep their old hash.
    os.utime(folder / WEIGHTS)
    place = workspace(tmp_path / "w")
    vae_key(place, folder)
    assert not (place.root / "manifests" / "weights.json").exists()


def test_weights_in_several_files(folder: Path, tmp_path: Path) -> None:
    single = vae_key(workspace(tmp_path / "w"), folder)
    (folder / WEIGHTS).rename(folder / "part-1.safetensors")
    (folder / "part-2.safetensors").write_bytes(b"more")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    both = vae_key(workspace(tmp_path / "w"), folder)
    (folder / "part-2.safetensors").write_bytes(b"else")
    assert len({single, both, vae_key(workspace(tmp_path / "w"), folder)}) == 3
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"part-2\.safetensors is gone"):
        vae_key(workspace(tmp_path / "w"), folder)
    (folder / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(UsageError, match="not an index"):
        vae_key(workspace(tmp_path / "w"), folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"latent_channels": 16}, "16 latent channels"),
        ({"block_out_channels": [8, 8, 8]}, "1/4 of the size"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"block_out_channels": 4}, r"1/\? of the size"),
    ],
)
def test_other_vaes_are_refused(
    folder: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    change(folder, **entries)
    with pytest.raises(UsageError, match=message):
        vae_key(workspace(tmp_path / "w"), folder)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=f"There is no {WEIGHTS}"):
        vae_key(workspace(tmp_path / "w"), folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        vae_key(workspace(tmp_path / "w"), folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"There is no .*config\.json"):
        vae_key(workspace(tmp_path / "w"), folder)


def test_tile_size_must_be_whole_latents(folder: Path, tmp_path: Path) -> None:
    vae_key(workspace(tmp_path / "w", vae_tile_size=500), folder)
    with pytest.raises(UsageError, match="vae_tile_size is 500"):
        vae_key(workspace(tmp_path / "w", vae_tile_size=500, vae_enable_tiling=True), folder)


def test_scaling_factor_is_the_configured_one(folder: Path) -> None:
    assert scaling_factor(folder) == 0.13025


def test_loading_follows_the_options(folder: Path, tmp_path: Path) -> None:
    import torch

    cpu = torch.device("cpu")
    plain = load_vae(folder, workspace(tmp_path / "w").config.vae, cpu)
    assert plain.dtype == torch.float32
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())
    assert (plain.use_tiling, plain.use_slicing) == (False, False)
    options = {
        "vae_dtype": "bf16",
        "vae_enable_tiling": True,
        "vae_tile_size": 64,
        "vae_enable_slicing": True,
    }
    other = load_vae(folder, workspace(tmp_path / "w", **options).config.vae, cpu)
    assert other.dtype == torch.bfloat16
    assert other.use_tiling
    assert other.use_slicing
    assert (other.tile_sample_min_size, other.tile_latent_min_size) == (64, 8)


def _damaged(folder: Path, damage: str) -> None:
    """Damage the weights of the VAE in `folder`, or its configuration."""
    from safetensors.torch import load_file, save_file

    weights = folder / WEIGHTS
    if damage == "garbage":
        weights.write_bytes(b"garbage" * 100)
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "cut":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "groups":
        change(folder, norm_num_groups=7)
    elif damage == "blocks":
        change(folder, block_out_channels=["a"] * 4)
    else:
        tensors = load_file(weights)
        if damage == "missing":
            del tensors["quant_conv.weight"]
        else:
            tensors["quant_conv.weight"] = tensors["quant_conv.weight"][1:].contiguous()
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("garbage", "Unable to load weights"),
        ("empty", "Unable to load weights"),
        ("cut", "Unable to load weights"),
        ("missing", "1 tensors are missing, such as quant_conv.weight"),
        ("shape", r"quant_conv.weight expected shape"),
        ("groups", "must be divisible"),
        ("blocks", "cannot be loaded"),
    ],
)
def test_unusable_weights_are_wrong_usage(
    folder: Path, tmp_path: Path, damage: str, message: str
) -> None:
    import torch

    _damaged(folder, damage)
    with pytest.raises(UsageError, match=message) as caught:
        load_vae(folder, workspace(tmp_path / "w").config.vae, torch.device("cpu"))
    assert str(folder) in str(caught.value)
    assert "Fetch the model again" in str(caught.value)


def test_tiles_meet(folder: Path, tmp_path: Path) -> None:
    """A tiled latent has the size of the whole one for every side, and resembles it."""
    import torch

    options = {"vae_enable_tiling": True, "vae_tile_size": 96}
    tiled = load_vae(folder, workspace(tmp_path / "w", **options).config.vae, torch.device("cpu"))
    whole = load_vae(folder, workspace(tmp_path / "w").config.vae, torch.device("cpu"))
    x = torch.rand(1, 3, 208, 272, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        a, b = (each.encode(x).latent_dist.mean for each in (tiled, whole))
    assert a.shape == b.shape == (1, 4, 26, 34)
    assert not torch.equal(a, b)
    assert (a - b).abs().mean() < 0.5 * b.abs().mean()


def test_exact_float32_leaves_torch_as_it_was() -> None:
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32)
    with exact_float32():
        assert (cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32) == (False, True, False)
    assert (cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32) == before
    assert vae.ENCODE_VERSION >= 1


def test_the_index_goes_before_the_single_file_as_in_diffusers(
    folder: Path, tmp_path: Path
) -> None:
    before = vae_key(workspace(tmp_path / "w"), folder)
    shard = folder / "diffusion_pytorch_model-00001-of-00001.safetensors"
    shard.write_bytes((folder / WEIGHTS).read_bytes())
    tensors = load_file(shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert vae_key(workspace(tmp_path / "w"), folder) == before, "the same bytes"
    name = "encoder.conv_in.bias"
    save_file({**tensors, name: tensors[name] + 1}, shard)
    assert vae_key(workspace(tmp_path / "w"), folder) != before
    config = workspace(tmp_path / "w").config.vae
    loaded = load_vae(folder, config, torch.device("cpu")).state_dict()
    assert torch.equal(loaded[name], tensors[name] + 1)


def test_a_tiny_decoder_is_frozen_and_on_the_cpu(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    tiny = load_tiny(build_small_tiny(tmp_path / "tiny"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not tiny.training
    assert {(p.device.type, p.dtype, p.requires_grad) for p in tiny.parameters()} == {
        ("cpu", torch.float32, False)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_channels": 16}, "16 latent channels at 1/8"),
        ({"num_decoder_blocks": (1, 1), "decoder_block_out_channels": (8, 8)}, "at 1/2 of"),
    ],
)
def test_a_tiny_decoder_of_other_latents_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_tiny(build_small_tiny(tmp_path / "tiny", **options))


def test_what_is_no_tiny_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="describes AutoencoderKL"):
        load_tiny(folder)
    with pytest.raises(UsageError, match="cannot be read as that of an AutoencoderTiny"):
        load_tiny(tmp_path)
    tiny = build_small_tiny(tmp_path / "tiny")
    weights = load_file(tiny / WEIGHTS)
    weights.pop("decoder.layers.0.weight")
    save_file(weights, tiny / WEIGHTS)
    with pytest.raises(UsageError, match=r"1 tensors are missing.*validation_preview_model"):
        load_tiny(tiny)
