"""Folders of pictures, and workspaces over them, for the benchmark to work on."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnigen_pipe.images.catalogue import discovered_settings, options_fingerprint
from omnigen_pipe.workspace import Workspace

#: Files per folder.
_PER_FOLDER = 1000

#: Different prompts and latents of `training_data`, which come again and again.
_PROMPTS, _LATENTS = 1000, 64

#: Long enough ago that discover trusts the times (nanoseconds since 1970).
_LONG_AGO = 1_700_000_000 * 10**9


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with detail at all scales, as photographs have, of random content."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, np.float32)
    side = 4
    while side < max(width, height):
        coarse = random.normal(0, 1, (side, side, 3)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(coarse[..., c]).resize((width, height))) for c in range(3)
        ]
        pixels += 45 * (4 / side) ** 0.7 * np.stack(planes, axis=-1)
        side *= 2
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpegs(folder: Path, number: int, sizes: Sequence[tuple[int, int]], kinds: int = 20) -> int:
    """Write `number` JPEGs of so many `kinds`, of `sizes` in pixels; returns their bytes.

    All differ, by a comment after their first marker, so that each has a hash of its own.
    """
    contents = []
    for kind in range(min(kinds, number)):
        data = io.BytesIO()
        picture(*sizes[kind % len(sizes)], seed=kind).save(data, "JPEG", quality=88)
        contents.append(data.getvalue())
    written = 0
    for path, index in _paths(folder, number):
        content = contents[index % len(contents)]
        comment = f"picture {index}".encode()
        head = b"\xff\xd8\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        path.write_bytes(head + content[2:])
        os.utime(path, ns=(_LONG_AGO, _LONG_AGO))
        written += len(head) + len(content) - 2
    return written


def empty_files(folder: Path, number: int) -> None:
    """Write `number` files with the names of JPEGs and nothing in them."""
    for path, _ in _paths(folder, number):
        with open(path, "wb"):
            pass
        os.utime(path, ns=(_LONG_AGO, _LONG_AGO))


def _paths(folder: Path, number: int) -> Any:
    for index in range(number):
        inner = folder / f"{index // _PER_FOLDER:04d}"
        if index % _PER_FOLDER == 0:
            inner.mkdir(parents=True)
        yield inner / f"{index:07d}_a_red_house_under_old_trees.jpg", index


def workspace(
    root: Path, *lines: str, model: str = "embedded", vae: Path | None = None
) -> Workspace:
    """A workspace over `root`/photos; `lines` are further options of its dataset."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "photos").mkdir(exist_ok=True)
    text = f"[model]\npretrained_model_name_or_path = {json.dumps(model)}\n"
    if vae is not None:
        text += f"pretrained_vae_model_name_or_path = {json.dumps(str(vae))}\n"
    text += '[[dataset]]\nid = "photos"\ninstance_data_dir = "photos"\n'
    (root / "omnigen-pipe.toml").write_text(text + "".join(f"{line}\n" for line in lines))
    return Workspace.open(root)


def know_all(workspace: Workspace) -> None:
    """Write logs and a snapshot as if discover had read every file of `workspace`, which it has
    not: for files that are empty."""
    import pyarrow as pa

    from manifests.schema import FILES, IMAGES

    root = workspace.root / "photos"
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    number = len(paths)
    digests = np.random.default_rng(0).bytes(16 * number).hex()
    columns = {
        "dataset": ["photos"] * number,
        "path": paths,
        "size": np.zeros(number, int),
        "mtime_ns": np.full(number, _LONG_AGO),
        "read_at_ns": np.full(number, 2 * _LONG_AGO),
        "content_hash": [digests[32 * i : 32 * (i + 1)] for i in range(number)],
        "format": ["JPEG"] * number,
        "width": np.full(number, 1024),
        "height": np.full(number, 1024),
        "mode": ["RGB"] * number,
        "frames": np.ones(number, int),
        "captions": [[Path(path).stem.replace("_", " ")] for path in paths],
        "status": ["ok"] * number,
    }
    tables = [
        pa.table(
            [pa.array(columns.get(f.name, [None] * number), f.type) for f in manifest.schema],
            schema=manifest.schema,
        )
        for manifest in (FILES, IMAGES)
    ]
    workspace.files.append(tables[0])
    datasets = workspace.config.datasets
    workspace.images.replace(
        tables[1],
        fingerprint=options_fingerprint(datasets),
        settings=json.dumps(discovered_settings(datasets), sort_keys=True),
    )


def training_data(workspace: Workspace, number: int, side: int, tokens: int) -> Path:
    """Everything that training reads of `number` samples of `side` pixels square, as the stages
    publish it: samples, prompts of 45 ids below `tokens`, and random latents in shards. No VAE
    runs. Returns the frozen samples."""
    import pyarrow as pa

    from manifests.schema import PROMPTS, SAMPLES
    from omnigen_pipe.images.samples import samples_fingerprint, samples_settings
    from omnigen_pipe.latents.shards import ShardWriter
    from omnigen_pipe.runs.frozen import freeze, join
    from omnigen_pipe.settings import as_text

    vae_key, tokenizer_key, name = "a" * 32, "b" * 32, f"{side}x{side}"
    random = np.random.default_rng(0)
    ids = random.integers(3, tokens, (min(number, _PROMPTS), 45))
    samples = [
        {
            "sample_id": f"{index:032x}",
            "dataset": "photos",
            "split": "train",
            "bucket": name,
            "pixels_key": f"{index:032x}",
            "captions": [""],
            "prompt_keys": [f"{index % len(ids):032x}"],
            "repeats": 0,
            "status": "ok",
        }
        for index in range(number)
    ]
    workspace.samples.replace(
        pa.Table.from_pylist(samples, SAMPLES.schema),
        settings=as_text(samples_settings(workspace.config)),
        fingerprint=samples_fingerprint(workspace.images.source(), workspace.config),
    )
    prompts = [
        {"prompt_key": f"{n:032x}", "tokenizer_key": tokenizer_key, "input_ids": row}
        for n, row in enumerate(ids.tolist())
    ]
    rows = [prompt | {"length": 45, "status": "ok"} for prompt in prompts]
    workspace.prompts.append(pa.Table.from_pylist(rows, PROMPTS.schema))
    shape = (_LATENTS, 8, side // 8, side // 8)
    moments = random.standard_normal(shape, dtype=np.float32).astype(np.float16)
    # A clock that stands still: shards close by size alone, as on a machine that is fast enough.
    with ShardWriter(workspace, vae_key, {}, clock=lambda: 0.0) as writer:
        for index, sample in enumerate(samples):
            latent = moments[index % _LATENTS]
            writer.add(sample["pixels_key"], name, latent, {"bucket": name})
    path = workspace.run_folder("bench") / "samples.arrow"
    metadata = {"vae_key": vae_key, "scaling_factor": "0.13025", "dropout_ids": "[3, 4]"}
    freeze(join(workspace, vae_key, tokenizer_key).table, path, workspace.staging, metadata)
    return path


def vae(folder: Path, channels: tuple[int, ...], layers: int, attention: bool) -> Path:
    """A VAE of random weights in diffusers' layout, with 4 latent channels at 1/8 of the size."""
    import torch

    from omnigen_pipe.quiet import quiet_imports

    with quiet_imports():
        from diffusers import AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=layers,
            norm_num_groups=min(32, channels[0]),
            latent_channels=4,
            mid_block_add_attention=attention,
        )
    made.save_pretrained(folder)
    return folder
