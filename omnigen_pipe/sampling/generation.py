"""`omnigen-pipe generate`: pictures from prompts, with any OmniGen and any of our adapters.

Whatever can be wrong in the request is found before the model is loaded. Each batch's pictures
are written as soon as they are drawn, and a grid of what was drawn also where the work ends early:
the pictures of a grid stay in memory until then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import UsageError
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.sampling.drawer import Drawer, batches, drawn
from omnigen_pipe.sampling.files import check_size, checked_path, output_paths, write_picture
from omnigen_pipe.sampling.grid import Grid, planned_grid
from omnigen_pipe.sampling.metadata import grid_metadata, picture_metadata
from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.stop import Stopped, stop_on_signal
from omnigen_pipe.summary import Summary

if TYPE_CHECKING:
    from PIL import Image

#: Where pictures go that are not told where to.
DEFAULT_FOLDER = Path("generated")


@dataclass(frozen=True)
class Output:
    """Where pictures and their grid go; see `files.output_paths`.

    `pictures` None means no files of their own where there is a grid, else `DEFAULT_FOLDER`.
    """

    pictures: Path | None = None
    overwrite: bool = False
    grid: Path | None = None
    captions: bool = True


@dataclass
class _Drawn:
    """What has been drawn so far: the files, the pictures for the grid, and the black ones."""

    paths: dict[Request, Path | None]
    pictures: dict[Request, Image.Image]
    overflowed: int = 0


def generate(
    drawer: Drawer,
    requests: Sequence[Request],
    settings: Settings,
    output: Output,
    progress: Progress,
) -> Summary:
    """Draw and write the pictures of `requests`, and say where they lie.

    A picture that comes out as something else than numbers is not written, and makes the summary
    a failed one. Raises `UsageError` and `PipeError` as the parts do.
    """
    files = _files(output, requests)
    grid = _checked_grid(output, requests, settings)
    tokenizer = drawer.source.tokenizer()

    from omnigen_pipe.device import peak_memory, pick_device, pick_precision
    from omnigen_pipe.model.transformer import check_fits
    from omnigen_pipe.sampling.pipeline import largest_token

    device = pick_device(drawer.device)
    dtype = pick_precision(drawer.precision, device)
    dtype_name = str(dtype).removeprefix("torch.")
    prompts = [*dict.fromkeys(request.prompt for request in requests), settings.negative_prompt]
    token = largest_token(tokenizer, prompts)
    check_fits(drawer.source.outline().config, [settings.size], token, "Choose a smaller --size.")
    drawer.source.check(drawer.adapter)
    progress.note(f"Loading {drawer.source.label} on {device}.")
    pipe = drawer.source.pipeline(
        tokenizer,
        device,
        dtype,
        drawer.adapter,
        base_precision=drawer.base_precision,
        via=drawer.via,
    )

    began = time.monotonic()
    summary = Summary("generate", changed=True, unchanged="")
    done = _Drawn({}, {})
    written = None
    work = batches(requests, drawer.batch_size)
    steps = len(work) * settings.num_inference_steps
    with stop_on_signal() as stop, progress.task("Drawing", steps) as advance:

        def on_step() -> None:
            advance(1, "steps")
            stop.obey()

        def say(sentence: str) -> None:
            summary.say(progress, sentence)

        try:
            for batch in work:
                for request, picture in drawn(pipe, dtype, batch, settings, on_step, say):
                    if picture is None:
                        done.overflowed += 1
                        continue
                    path = files[request]
                    if path is not None:
                        told = picture_metadata(drawer, dtype_name, settings, request)
                        path = write_picture(picture, path, told, output.overwrite)
                    done.paths[request] = path
                    if grid is not None:
                        done.pictures[request] = picture
        except Stopped as stopped:
            summary.signal = stopped.signal
            summary.notes.append(f"Stopped: {len(done.paths)} of {len(requests)} were drawn.")
        finally:
            if grid is not None and done.pictures:
                cells = [cell for cell in grid.cells if cell in done.pictures]
                told = grid_metadata(drawer, dtype_name, settings, cells)
                written = _write_grid(grid, done, told, output)
                if len(done.paths) + done.overflowed < len(requests):
                    progress.note(f"Wrote what was drawn: {written}", always=True)
    summary.counts = {"pictures": len(done.paths)}
    _account(summary, done.overflowed, dtype_name, drawer)
    summary.details = {
        "model": drawer.source.label,
        "adapter": None if drawer.adapter is None else str(drawer.adapter.absolute()),
        **settings.model_dump(),
        "precision": dtype_name,
        "base_model_precision": drawer.base_precision,
        "device": str(device),
        "pictures": [_entry(request, path) for request, path in done.paths.items()],
        "grid": None if written is None else str(written.absolute()),
        "seconds": round(time.monotonic() - began, 3),
        "memory_gib": round(peak_memory(device), 3),
    }
    return summary


def _entry(request: Request, path: Path | None) -> dict[str, object]:
    """What the JSON says of one picture, and where it lies, if it has a file."""
    return {
        "path": None if path is None else str(path.absolute()),
        "name": request.name,
        "prompt": request.prompt,
        "seed": request.seed,
        "strength": request.strength,
    }


def _files(output: Output, requests: Sequence[Request]) -> Mapping[Request, Path | None]:
    """The file of each picture; None where only the grid is wanted."""
    if output.grid is not None:
        checked_path("--grid", output.grid, output.overwrite)
        if output.pictures is None:
            return dict.fromkeys(requests)
    files = output_paths(output.pictures or DEFAULT_FOLDER, requests, output.overwrite)
    if output.grid is not None and output.grid.absolute() in [file.absolute() for file in files]:
        raise UsageError(f"--grid and --output are both {output.grid}. Name another.")
    return dict(zip(requests, files, strict=True))


def _checked_grid(output: Output, requests: Sequence[Request], settings: Settings) -> Grid | None:
    """The grid, if one is wanted, once it is known that its file can hold it."""
    if output.grid is None:
        return None
    grid = planned_grid(requests, output.captions)
    size = grid.size(settings.width, settings.height)
    check_size("--grid", output.grid, size, "draw fewer or smaller pictures")
    return grid


def _write_grid(grid: Grid, done: _Drawn, told: Mapping[str, str], output: Output) -> Path:
    """Write the grid of what is `done`; returns its file."""
    assert output.grid is not None  # else there would be no grid
    return write_picture(grid.picture(done.pictures), output.grid, told, output.overwrite)


def _account(summary: Summary, overflowed: int, dtype: str, drawer: Drawer) -> None:
    """Say of pictures that were not written why, and what to do."""
    if not overflowed:
        return
    summary.failed = True
    summary.left_out = {"the model's numbers overflowed: the picture would be black": overflowed}
    remedies = []
    if dtype != "float32":
        remedies.append(f"use --precision {'bf16 or fp32' if dtype == 'float16' else 'fp32'}")
    if drawer.base_precision != "no_change":
        remedies.append("use --base-model-precision no_change")
    if drawer.adapter is not None:
        remedies.append("lower --strength")
    if not remedies:
        remedies.append("fetch the model again: its weights are not numbers, or too large")
    summary.notes.append(f"To mend that, {', or '.join(remedies)}.")


def remarks(summary: Summary, settings: Settings, chosen: bool) -> list[str]:
    """Sentences for a person: where the pictures lie, and a negative prompt that was not `chosen`
    by an option and is not the usual one."""
    paths = [entry["path"] for entry in summary.details["pictures"] if entry["path"]]
    said = [f"Wrote {path}" for path in paths[:10]]
    if len(paths) > 10:
        said.append(f"and {len(paths) - 10} more in {Path(paths[-1]).parent}")
    if summary.details["grid"]:
        said.append(f"Wrote {summary.details['grid']}")
    if not chosen and settings.negative_prompt != DIFFUSERS_NEGATIVE_PROMPT:
        said.append(f"Negative prompt: {settings.negative_prompt or '(empty)'}")
    return said
