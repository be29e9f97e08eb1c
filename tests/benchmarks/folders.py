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
    text = '[model]\npretrained_model_name_or_path = "embedded"\n'
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
