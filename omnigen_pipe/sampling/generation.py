"""`omnigen-pipe generate`: pictures from prompts, with any OmniGen and any of our adapters.

Whatever can be wrong in the request is found before the model is loaded. Each batch's pictures
are written as soon as they are drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from manifests.parquet import tool_version
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.library import read_library, validation_prompts
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.sampling.files import file_place, places, write_picture
from omnigen_pipe.sampling.requests import Request, Settings, requested
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: Where pictures go that are not told where to.
DEFAULT_FOLDER = Path("generated")


@dataclass(frozen=True)
class Output:
    """Where pictures and their contact sheet go; see `files.places`.

    `pictures` None means no files of their own where there is a sheet, else `DEFAULT_FOLDER`.
    """

    pictures: Path | None = None
    overwrite: bool = False
    grid: Path | None = None
    captions: bool = True


@dataclass(frozen=True)
class Drawer:
    """What draws: a model, an adapter's file and its strength, and where and how it computes."""

    source: Source
    adapter: Path | None = None
    strength: float = 1.0
    device: str | None = None
    precision: str = "auto"
    batch_size: int = 1


def wanted(
    workspace: Workspace | None,
    prompts: Sequence[str],
    library: Path | None,
    seed: int,
    count: int,
) -> list[Request]:
    """The pictures that are asked for; without prompts, the validation prompts of `workspace`."""
    by_nickname = read_library(library, "--prompt-library") if library is not None else {}
    if not prompts and library is None and workspace is not None:
        by_nickname = validation_prompts(workspace)
    if not prompts and not by_nickname:
        raise UsageError(
            "There is nothing to draw. Give a prompt, such as "
            '`omnigen-pipe generate "a red circle"`, or a file with --prompt-library.'
        )
    return requested(prompts, by_nickname, seed, count)


def settled(source: Source, workspace: Workspace | None, options: Mapping[str, object]) -> Settings:
    """How pictures are drawn: `options`, else what the workspace says, else the model's own.

    `workspace` is None where the model is not a workspace's.
    """
    settings = source.settings()
    if workspace is not None:
        negative = workspace.config.validation.validation_negative_prompt
        if negative is not None:
            settings = settings.changed({"negative_prompt": negative}, "[validation]")
    return settings.changed(options, "The options")


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
    tokenizer = drawer.source.tokenizer()

    from omnigen_pipe.device import peak_memory, pick_device, pick_precision
    from omnigen_pipe.model.transformer import check_fits
    from omnigen_pipe.sampling.pipeline import largest_token

    device = pick_device(drawer.device)
    dtype = pick_precision(drawer.precision, device)
    prompts = [*dict.fromkeys(request.prompt for request in requests), settings.negative_prompt]
    token = largest_token(tokenizer, prompts)
    check_fits(drawer.source.outline().config, [settings.size], token, "Choose a smaller --size.")
    progress.note(f"Loading {drawer.source.label} on {device}.")
    pipe = drawer.source.pipeline(tokenizer, device, dtype, drawer.adapter, drawer.strength)

    began = time.monotonic()
    drawn = []
    with progress.task("Drawing", _steps(requests, drawer, settings)) as advance:
        for request, path, picture in _pictures(
            pipe, dtype, drawer, requests, files, settings, lambda: advance(1, "steps")
        ):
            if path is not None:
                told = made(drawer, request, settings)
                path = write_picture(picture, path, told, output.overwrite)
            kept = picture if output.grid is not None else None
            drawn.append((request, path, kept))
    sheet = None
    if output.grid is not None and drawn:
        complete = len(drawn) == len(requests)
        captioned = [(request, kept) for request, _, kept in drawn]
        sheet = _write_grid(captioned, output.grid, output, complete)
    summary = Summary("generate", changed=True, counts={"pictures": len(drawn)}, unchanged="")
    _account(summary, len(requests) - len(drawn), drawer)
    summary.details = {
        "model": drawer.source.label,
        "adapter": None if drawer.adapter is None else str(drawer.adapter.absolute()),
        "strength": drawer.strength,
        **settings.model_dump(),
        "precision": str(dtype).removeprefix("torch."),
        "device": str(device),
        "pictures": [
            {
                "path": None if path is None else str(path.absolute()),
                "name": request.name,
                "prompt": request.prompt,
                "seed": request.seed,
            }
            for request, path, _ in drawn
        ],
        "grid": None if sheet is None else str(sheet.absolute()),
        "seconds": round(time.monotonic() - began, 3),
        "memory_gib": round(peak_memory(device), 3),
    }
    return summary


def _files(output: Output, requests: Sequence[Request]) -> list[Path | None]:
    """The file of each picture; None where only the contact sheet is wanted."""
    if output.grid is not None:
        file_place("--grid", output.grid, output.overwrite)
        if output.pictures is None:
            return [None] * len(requests)
    files = places(output.pictures or DEFAULT_FOLDER, requests, output.overwrite)
    if output.grid is not None and output.grid.absolute() in [file.absolute() for file in files]:
        raise UsageError(f"--grid and --output are both {output.grid}. Name another.")
    return [*files]


def _steps(requests: Sequence[Request], drawer: Drawer, settings: Settings) -> int:
    """Steps of all batches."""
    return len(range(0, len(requests), drawer.batch_size)) * settings.num_inference_steps


def _pictures(
    pipe: Any,
    dtype: Any,
    drawer: Drawer,
    requests: Sequence[Request],
    files: Sequence[Path | None],
    settings: Settings,
    on_step: Callable[[], object],
) -> Iterator[tuple[Request, Path | None, Any]]:
    """Each picture that could be drawn, with its request and file, batch by batch."""
    from omnigen_pipe.sampling.pipeline import draw

    for start in range(0, len(requests), drawer.batch_size):
        batch = slice(start, start + drawer.batch_size)
        autocast = _autocast(pipe.device, dtype)
        pictures = draw(pipe, requests[batch], settings, autocast, on_step)
        for request, path, picture in zip(requests[batch], files[batch], pictures, strict=True):
            if picture is not None:
                yield request, path, picture


def _autocast(device: Any, dtype: Any) -> Any:
    """The precision of a pass, as in training: the base model's, the adapter's included."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def made(drawer: Drawer, request: Request, settings: Settings) -> dict[str, str]:
    """How a picture was made, for its file: no paths, which concern nobody else."""
    said = {
        "prompt": request.prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": str(request.seed),
        "steps": str(settings.num_inference_steps),
        "guidance": f"{settings.guidance_scale:g}",
        "size": settings.size,
        "model": drawer.source.label,
        "software": f"omnigen-pipe {tool_version()}",
    }
    if drawer.adapter is not None:
        said |= {"adapter": drawer.adapter.name, "strength": f"{drawer.strength:g}"}
    return said


def _account(summary: Summary, lost: int, drawer: Drawer) -> None:
    """Say of pictures that were not written why, and what to do."""
    if not lost:
        return
    summary.failed = True
    summary.left_out = {"the model's numbers overflowed: the picture would be black": lost}
    remedy = "use another --precision, such as no or bf16"
    if drawer.adapter is not None:
        remedy += ", or lower --strength"
    summary.notes.append(f"To mend that, {remedy}.")


def _write_grid(
    drawn: Sequence[tuple[Request, Any]], path: Path, output: Output, complete: bool
) -> Path:
    """The contact sheet: the pictures of one prompt in a row, where there are several of each."""
    from omnigen_pipe.sampling.grid import contact_sheet

    seeds = {request.seed for request, _ in drawn}
    several = len(seeds) > 1
    captions = [
        f"{request.prompt} (seed {request.seed})" if several else request.prompt
        for request, _ in drawn
    ]
    sheet = contact_sheet(
        [picture for _, picture in drawn],
        captions if output.captions else None,
        len(seeds) if several and complete else None,
    )
    told = {"software": f"omnigen-pipe {tool_version()}"}
    return write_picture(sheet, path, told, output.overwrite)


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
