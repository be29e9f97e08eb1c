"""`generate`: pictures from prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from manifests.errors import UsageError
from omnigen_pipe import precisions
from omnigen_pipe.cli.base_model import check_revision, model_workspace
from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import DeviceOption, JsonOption, QuietOption, given_path
from omnigen_pipe.cli.outcome import report

if TYPE_CHECKING:
    from omnigen_pipe.sampling.source import Source
    from omnigen_pipe.workspace import Workspace

PicturePanel = "What the pictures are"
FilePanel = "Where they go"
ModelPanel = "What draws them"


@command(
    "generate",
    epilog="Examples:  \n"
    '`omnigen-pipe generate "a red circle on a black background" -o out.png`  \n'
    "`omnigen-pipe generate --adapter runs/default --strength 0 --strength 1 --grid grid.png`  \n"
    '`omnigen-pipe generate "a cat" "a dog" --model Shitao/OmniGen-v1-diffusers --count 4 '
    "--size 768x1024 -o pets`",
)
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to draw.  Default: the validation prompts of the workspace.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="`embedded`, or the hub id or folder of an OmniGen.  Default: the workspace's.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION",
            help="Branch, tag or commit of the hub id that --model names.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace",
            "-w",
            parser=given_path,
            help="Folder with omnigen-pipe.toml, whose model and validation prompts are taken.  "
            "Default: the current one.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            help="An adapter's file, a checkpoint's folder, or a run's: its newest checkpoint.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    ema: Annotated[
        bool,
        typer.Option(
            "--ema",
            help="Take the adapter's average, of a run that was trained with use_ema.",
            rich_help_panel=ModelPanel,
        ),
    ] = False,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            help="Strength of the adapter, times the one it was trained at; 0 is the base model.  "
            "Several, each with its own --strength, draw every picture at each.  Default: 1.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    prompt_library: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="JSON file of nickname: prompt; pictures are named by nickname.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What guidance steers away from.  Default: the workspace's, else the model's.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size in pixels, multiples of 16.  Default: the workspace's first "
            "validation_resolution, else the model's, else 1024x1024.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps from noise to picture.  Default: the workspace's "
            "validation_num_inference_steps, else the model's, else 50.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How strongly to follow the prompt; 1 is without guidance.  "
            "Default: the workspace's validation_guidance, else the model's, else 2.5.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**62,  # config.MAX_PICTURE_SEED
            help="Seed of each prompt's first picture; the next has the next.  "
            "Default: the workspace's validation_seed, else 0.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Pictures of each prompt.", rich_help_panel=PicturePanel)
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=given_path,
            help="File (.png, .jpg, .webp) of one picture, or folder of several.  "
            "Default: the folder `generated`, or only the grid.",
            rich_help_panel=FilePanel,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace files that are there.", rich_help_panel=FilePanel
        ),
    ] = False,
    grid: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Put all pictures on one grid.",
            rich_help_panel=FilePanel,
        ),
    ] = None,
    captions: Annotated[
        bool,
        typer.Option(
            "--captions/--no-captions",
            help="Write the prompts under the pictures of the grid.",
            rich_help_panel=FilePanel,
        ),
    ] = True,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures at once; changes speed and memory only.")
    ] = 1,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32", "no"] | None,
        typer.Option(
            help="What the transformer computes in: bf16, fp16, fp32 (or no, which is the same), "
            "or auto: bf16 where the GPU has it, else fp32.  Default: the workspace's "
            "mixed_precision, else auto.",
        ),
    ] = None,
    base_model_precision: Annotated[
        precisions.BasePrecision | None,
        typer.Option(
            help="Fewer bits for the base model's weights, such as int8-torchao or nf4-bnb.  "
            "Default: the workspace's, else no_change.",
        ),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures from prompts, with or without an adapter."""
    from omnigen_pipe.config import TrainConfig
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.runs.checkpoints import locate_adapter
    from omnigen_pipe.sampling import generation, requests
    from omnigen_pipe.sampling.drawer import Drawer
    from omnigen_pipe.sampling.source import Source

    if adapter is None and (strength or ema):
        option = "--strength" if strength else "--ema"
        raise UsageError(f"{option} is an adapter's: name one with --adapter.")
    for number in strength or []:
        if not math.isfinite(number):
            raise UsageError(f"--strength {number}: it must be a number.")
    opened = model_workspace(workspace, model)
    check_revision(revision, model)
    source = (Source.of(opened) if opened else Source(model or "", Path.cwd(), revision)).pinned()
    file: Path | None = None
    passed_over: list[str] = []
    if adapter is not None:
        file, passed_over = locate_adapter(adapter, ema)
    given: dict[str, object] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
        **(requests.parsed_size(size) if size is not None else {}),
    }
    options = {key: value for key, value in given.items() if value is not None}
    wanted = requests.chosen_requests(opened, prompts or [], prompt_library, seed, count)
    if adapter is not None:
        wanted = requests.at_strengths(wanted, strength or [1.0])
    computing = opened.config.train if opened else TrainConfig()
    chosen = precision or computing.mixed_precision
    drawer = Drawer(
        source,
        file,
        device,
        "no" if chosen == "fp32" else chosen,
        base_model_precision or computing.base_model_precision,
        computing.quantize_via,
        batch_size,
    )
    settings = requests.chosen_settings(source.settings(), opened, options)
    place = generation.Output(output, overwrite, grid, captions)
    summary = generation.generate(drawer, wanted, settings, place, Progress(quiet))
    summary.notes[:0] = [*passed_over, *_adapter_notes(file, source, opened)]
    if not as_json:
        summary.notes += generation.remarks(summary, settings, negative_prompt is not None)
    report(summary, as_json, strict=False)


def _adapter_notes(file: Path | None, source: Source, workspace: Workspace | None) -> list[str]:
    """Which adapter `file` is, and a word where it was trained on another base than `source`."""
    from omnigen_pipe.model.provenance import read_provenance
    from omnigen_pipe.weights import weights_key

    if file is None:
        return []
    adapter = read_provenance(file)
    said = [f"Adapter: {adapter.label}"]
    if adapter.transformer_key is not None:
        key = weights_key(source.part("transformer"), workspace, remember=False)
        mismatch = adapter.mismatch(source.label, key)
        said += [mismatch] if mismatch else []
    return said
