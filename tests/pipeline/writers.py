"""The four writers of manifests, each with a workspace that is ready for it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from effect import Effect, effect
from PIL import Image
from pipeline_project import Project

#: In the order in which they run.
WRITERS = ("discover", "bucket", "encode-vae", "tokenize")

#: Seconds since 1970 at which all pictures were modified: long ago, so that one look suffices.
_LONG_AGO = 1_600_000_000


@dataclass(frozen=True)
class Writers:
    """Workspaces ready for each writer, and what each should hold in effect afterwards."""

    ready: dict[str, Path]
    expected: dict[str, Effect]

    def workspace(self, writer: str, folder: Path) -> Project:
        """A new workspace at `folder` that is ready for `writer`."""
        shutil.copytree(self.ready[writer], folder, dirs_exist_ok=True)
        return Project(folder)


def prepare(
    folder: Path, model: Path, pictures: int, larger: int | None = None, **vae: object
) -> Writers:
    """Draw so many `pictures` of noise in two shapes, and run every writer undisturbed.

    The workspaces of bucket hold samples.parquet already, made with other settings. With
    `larger` the pictures are wanted at so many pixels too. `vae` are options of [vae].
    """
    images = folder / "pictures"
    draw(images, pictures)
    here = Project(folder / "undisturbed")
    here.root.mkdir()
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in vae.items())

    dataset = f"instance_data_dir = {json.dumps(str(images))}\naspect_bucket_alignment = 16\n"
    more = f'[[dataset]]\nid = "larger"\n{dataset}resolution = {larger}\n' if larger else ""

    def configure(resolution: int) -> None:
        (here.root / "omnigen-pipe.toml").write_text(
            f"[model]\npretrained_model_name_or_path = {json.dumps(str(model))}\n[vae]\n{options}"
            f'[[dataset]]\nid = "main"\n{dataset}resolution = {resolution}\n{more}'
        )

    writers = Writers({}, {})
    for writer in WRITERS:
        if writer == "bucket":
            configure(48)
            here.run("bucket")
        configure(64)
        writers.ready[writer] = folder / f"ready for {writer}"
        shutil.copytree(here.root, writers.ready[writer])
        here.run(writer)
        writers.expected[writer] = effect(here.root)
    return writers


def draw(folder: Path, number: int) -> None:
    """Write `number` pictures of noise in two shapes, modified long ago."""
    folder.mkdir()
    for each in range(number):
        size = (96, 80) if each % 2 else (80, 112)
        noise = np.random.default_rng(each).integers(0, 256, (size[1], size[0], 3), np.uint8)
        path = folder / f"picture {each}.png"
        Image.fromarray(noise).save(path)
        os.utime(path, (_LONG_AGO, _LONG_AGO))
