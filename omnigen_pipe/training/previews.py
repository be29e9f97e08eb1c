"""Previews: what a validation picture will be, shown while it is drawn.

After every few steps the clean latent is estimated from the velocity (`pipeline.clean_estimate`)
and decoded by an AutoencoderTiny, which costs next to nothing. Drawing notices nothing of it: a
preview that fails is said once, and then there are none any more.

Those of the last validation are kept. Given up: previews of what other processes draw; latents
would have to be sent while all of them are busy.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from manifests.errors import PipeError, first_line
from manifests.publish import publishing
from omnigen_pipe.device import free_memory
from omnigen_pipe.events import EventFile, Events
from omnigen_pipe.latents.vae import load_tiny
from omnigen_pipe.model_files import lone_model
from omnigen_pipe.sampling import validation
from omnigen_pipe.sampling.pipeline import preview
from omnigen_pipe.sampling.validation import Wanted
from omnigen_pipe.workspace import Workspace

_CPU = torch.device("cpu")
#: Of 9: a file is written for each of many steps, while the drawing waits.
_COMPRESSION = 1


@dataclass
class Previews:
    """Shows how the pictures of the run in `folder` come about, in the process that writes.

    `tiny` is in main memory, and on the device only while it decodes.
    """

    tiny: Any
    #: Steps of drawing between two previews.
    every: int
    folder: Path
    staging: Path
    events: Events
    #: Is told why there are no more previews.
    say: Callable[[str], object]
    _failed: bool = False

    def clear(self, step: int, pictures: list[Wanted]) -> None:
        """Delete the previews of other validations than that after `step`, and of `pictures`, which
        are drawn now."""
        there = validation.FOLDER_NAME
        now = self.folder / there / f"step-{step:06d}" / validation.PREVIEWS_NAME
        names = {picture.file(self.folder, step).name for picture in pictures}
        for path, picture in list(validation.previews(self.folder)):
            if path.parent != now or picture in names:
                with suppress(OSError):  # a preview more harms nobody
                    path.unlink()
        for other in (self.folder / there).glob(f"step-*/{validation.PREVIEWS_NAME}"):
            with suppress(OSError):
                other.rmdir()  # where it is empty

    def show(
        self, step: int, picture: Wanted, number: int, latent: torch.Tensor, made: dict[str, str]
    ) -> None:
        """Publish and tell what `picture` would be, after `number` of its steps: `latent` is the
        scaled clean one, `[4, H/8, W/8]`, and `made` what the picture will say of itself."""
        if self._failed or number % self.every:
            return
        path = picture.preview_file(self.folder, step, number)
        total = picture.settings.num_inference_steps
        failure = None
        try:
            found = self._decoded(latent)
            if found is None:
                return  # so will the picture be, which says it
            content = _encoded(found, {**made, "preview": f"step {number} of {total}"})
            with publishing(self.staging, path) as unfinished:
                unfinished.write_bytes(content)
        # torch's own, of memory, too; Python's and numpy's; and Pillow's.
        except (PipeError, RuntimeError, MemoryError, OSError, ValueError) as error:
            failure = first_line(error)
        if failure is not None:  # not above: there the error holds on to what was computed
            free_memory()
            self._failed = True
            self.say(
                "A preview failed, and there are none from here on; the validation pictures are "
                f"drawn all the same: {failure}"
            )
            return
        self.events.send(
            "preview",
            EventFile(path.name, content),
            step=step,
            picture=picture.label,
            inference_step=number,
            num_inference_steps=total,
        )

    def _decoded(self, latent: torch.Tensor) -> Image.Image | None:
        try:
            return preview(self.tiny.to(latent.device), latent)
        finally:
            self.tiny.to(_CPU)


def load_previews(
    workspace: Workspace, folder: Path, events: Events, say: Callable[[str], object]
) -> Previews | None:
    """The previews of the run in `folder`; None where none are wanted.

    Raises `UsageError` where the model that decodes them cannot be had or used.
    """
    options = workspace.config.validation
    if not options.validation_preview:
        return None
    model = lone_model(
        workspace, options.validation_preview_model, options.validation_preview_revision
    )
    assert model is not None  # only without a download
    every = options.validation_preview_steps
    return Previews(load_tiny(model), every, folder, workspace.staging, events, say)


def _encoded(picture: Image.Image, made: dict[str, str]) -> bytes:
    """`picture` as the bytes of a PNG that says how it was `made`."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in made.items():
        chunks.add_text(key, value)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=chunks, compress_level=_COMPRESSION)
    return file.getvalue()
