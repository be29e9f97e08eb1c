"""The command line: options in, one stage called, its summary and exit status out.

The only module here that knows the stages. Whatever is slow to import (torch, diffusers,
DuckDB) is imported inside the command that needs it, so that `--help` starts at once.

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 done but with items left out
when `--strict` is given, 128 + N when a signal N ended it.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from manifests.errors import PipeError, UsageError
from omnigen_pipe import precisions

if TYPE_CHECKING:
    from collections.abc import Callable

    from omnigen_pipe.progress import Progress
    from omnigen_pipe.sampling.source import Source
    from omnigen_pipe.starting.questions import Question
    from omnigen_pipe.summary import Summary
    from omnigen_pipe.workspace import Workspace

app = typer.Typer(
    name="omnigen-pipe",
    help="Prepare captioned images for OmniGen-v1 and train a LoKr adapter on them.\n\n"
    "Five stages, each rerunnable at any time: discover, bucket, encode-vae, tokenize, train. "
    "`run` does all five and skips what is done.\n\n"
    "Start with: omnigen-pipe init, or omnigen-pipe demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help="Folder with omnigen-pipe.toml.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with status 3 when items were left out.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1 …  Default: CUDA if any."),
]

HERE = Path(".")


def _open(workspace: Path, quiet: bool) -> tuple[Workspace, Progress]:
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.workspace import Workspace

    return Workspace.open(workspace), Progress(quiet)


def _report(summary: Summary, as_json: bool, strict: bool) -> None:
    """Print one stage's summary and leave with the exit status it asks for."""
    if as_json:
        print(json.dumps(summary.as_json(), indent=2, default=str))
    else:
        from omnigen_pipe.summary import show

        show(summary)
    _leave([summary], strict)


def _leave(summaries: list[Summary], strict: bool) -> None:
    """Leave with the exit status that the summaries ask for, unless it is 0."""
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)
    for summary in summaries:
        if summary.signal is not None:
            raise typer.Exit(128 + summary.signal)
    if strict and any(summary.left_out for summary in summaries):
        raise typer.Exit(3)


FolderArgument = Annotated[
    Path | None, typer.Argument(help="Folder of the new workspace.  Default: the current one.")
]
SettingPanel = "Settings (asked for on a terminal, else a default)"
SimpleTunerPanel = "From SimpleTuner"


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe init my-project`  \n"
    "`omnigen-pipe init my-project --images ~/photos --caption-strategy textfile --yes`  \n"
    "`omnigen-pipe init my-project --from-simpletuner SimpleTuner/config/config.json`"
)
def init(
    folder: FolderArgument = None,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-w", help="The same as FOLDER.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of images, or hf://datasets/OWNER/NAME; once for each dataset.",
            rich_help_panel=SettingPanel,
        ),
    ] = None,
    caption_strategy: Annotated[
        str | None,
        typer.Option(
            help="Where captions come from: filename, textfile or instanceprompt.",
            rich_help_panel=SettingPanel,
        ),
    ] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(
            help="The caption of every image, with instanceprompt.", rich_help_panel=SettingPanel
        ),
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(
            help="Size of images: 1024 means about 1024*1024 pixels.", rich_help_panel=SettingPanel
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of an OmniGen.", rich_help_panel=SettingPanel),
    ] = None,
    run_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run: its folder is runs/NAME.", rich_help_panel=SettingPanel
        ),
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps to train.", rich_help_panel=SettingPanel)
    ] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Samples per step.", rich_help_panel=SettingPanel),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate after warm-up.", rich_help_panel=SettingPanel),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the defaults.")
    ] = False,
    from_simpletuner: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.JSON",
            help="Convert SimpleTuner's config.json and the files that it names.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    dataloader: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The dataloader's JSON file, where config.json does not lead to it.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    lycoris: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="lycoris_config.json, where config.json does not lead to it.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    relative_to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where relative paths in the JSON files start.  Default: SimpleTuner's folder.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented omnigen-pipe.toml, from answers or from SimpleTuner's files."""
    from omnigen_pipe.starting.configuration_file import write

    if folder is not None and workspace is not None and folder != workspace:
        raise UsageError(f"FOLDER is {folder} and --workspace is {workspace}: give one of them.")
    root = (folder or workspace or HERE).absolute()
    given: dict[str, object] = {
        "images": images,
        "caption_strategy": caption_strategy,
        "instance_prompt": instance_prompt,
        "resolution": resolution,
        "model": model,
        "run_name": run_name,
        "max_train_steps": max_train_steps,
        "train_batch_size": train_batch_size,
        "learning_rate": learning_rate,
    }
    if from_simpletuner is not None:
        if set_too := [name for name, value in given.items() if value is not None]:
            option = set_too[0].replace("train_", "").replace("_", "-")
            raise UsageError(
                f"--{option} and --from-simpletuner do not go together: the settings come from "
                "SimpleTuner's files. Edit them in the omnigen-pipe.toml that is written."
            )
        from omnigen_pipe.starting.report import show_conversion
        from omnigen_pipe.starting.simpletuner import convert

        conversion = convert(
            from_simpletuner, root, dataloader=dataloader, lycoris=lycoris, base=relative_to
        )
        path = write(root, conversion.values)
        show_conversion(conversion, as_json)
    else:
        from omnigen_pipe.starting.questions import answered, configured

        if dataloader or lycoris or relative_to:
            raise UsageError(
                "--dataloader, --lycoris and --relative-to only go with --from-simpletuner."
            )
        on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        asking = on_terminal and not yes and not as_json
        values = configured(answered(given, _ask if asking else None), root, Path.cwd())
        path = write(root, values)
        if as_json:
            print(json.dumps({"written": str(path), **values}, indent=2))
    if not as_json:
        where = "" if root == Path.cwd() else f" -w {shlex.quote(str(folder or workspace))}"
        print(f"Wrote {path}. Look through it, then:  omnigen-pipe run{where}")


def _ask(question: Question) -> object:
    """The answer typed at the terminal; an empty one is the default."""
    if not question.choices:
        return typer.prompt(question.text, default=question.default)
    allowed = ", ".join(question.choices)

    def chosen(answer: str) -> str:
        if answer not in question.choices:
            raise typer.BadParameter(f"{answer} is not one of {allowed}")
        return answer

    text = f"{question.text} ({allowed})"
    return typer.prompt(text, default=question.default, value_proc=chosen)


@app.command(
    epilog="Examples:  \n`omnigen-pipe discover`  \n`omnigen-pipe discover -w my-project --json`"
)
def discover(
    workspace: WorkspaceOption = HERE,
    allow_shrink: Annotated[
        bool,
        typer.Option(
            "--allow-shrink",
            help="Go on where a dataset's folder is gone or more than half of its files are.",
        ),
    ] = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the images and captions of every dataset, and list them in images.parquet."""
    import stages.discover

    opened, progress = _open(workspace, quiet)
    _report(stages.discover.run(opened, progress, allow_shrink=allow_shrink), as_json, strict)


@app.command(epilog="Examples:  \n`omnigen-pipe bucket`  \n`omnigen-pipe bucket --strict`")
def bucket(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give every image its size, crop and bucket, and list them in samples.parquet."""
    import stages.bucket

    opened, progress = _open(workspace, quiet)
    _report(stages.bucket.run(opened, progress), as_json, strict)


@app.command(
    "encode-vae",
    epilog="Examples:  \n"
    "`omnigen-pipe encode-vae`  \n"
    "`omnigen-pipe encode-vae --device cuda:1 --worker 2/4`  \n"
    "`omnigen-pipe encode-vae --retry-failed`",
)
def encode_vae(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Encode the I-th of N shares of the images, I from 1 to N.  Default: all, or "
            "the share of SLURM_ARRAY_TASK_ID in a SLURM job array.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try again what could not be encoded earlier."),
    ] = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode the latents that are missing, into shards under latents/."""
    import stages.encode_vae
    from omnigen_pipe.latents import share

    opened, progress = _open(workspace, quiet)
    mine = share.from_environment(os.environ) if worker is None else share.parse(worker)
    summary = stages.encode_vae.run(
        opened, progress, device=device, share=mine, retry_failed=retry_failed
    )
    _report(summary, as_json, strict)


@app.command(epilog="Examples:  \n`omnigen-pipe tokenize`  \n`omnigen-pipe tokenize --json`")
def tokenize(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tokenise the captions that are missing, and the dropout and validation prompts."""
    import stages.tokenize

    opened, progress = _open(workspace, quiet)
    _report(stages.tokenize.run(opened, progress), as_json, strict)


AllowMissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Train without samples that lack a latent or prompt."),
]


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe train`  \n"
    "`omnigen-pipe train --allow-missing --device cpu`  \n"
    "`omnigen-pipe train --processes 4`  \n"
    "`torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 1 "
    "--rdzv-endpoint HOST:29500 -m omnigen_pipe.cli train`"
)
def train(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Start so many processes on this machine, one per GPU, as torchrun does."
        ),
    ] = 1,
    allow_missing: AllowMissingOption = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the LoKr adapter, or go on where the run stopped."""
    import stages.train
    from omnigen_pipe.training.processes import from_environment

    opened, progress = _open(workspace, quiet)
    if processes > 1:
        stages.train.check(opened)  # before several processes say it
        raise typer.Exit(_start_processes(processes))
    summary = stages.train.run(opened, progress, device=device, allow_missing=allow_missing)
    if from_environment().is_first:
        _report(summary, as_json, strict)
    else:
        _leave([summary], strict)


def _start_processes(count: int) -> int:
    """Run this very command line in `count` processes; their exit status."""
    from omnigen_pipe.training.launch import launch
    from omnigen_pipe.training.processes import from_environment

    if from_environment().size > 1:
        raise UsageError("--processes starts processes, and torchrun has done so already.")
    arguments = sys.argv[1:]
    place = next(i for i, word in enumerate(arguments) if word.startswith("--processes"))
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    return launch(count, arguments)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe estimate`  \n"
    "`omnigen-pipe estimate --vram 12 --resolution 512`  \n"
    "`omnigen-pipe estimate -w my-project --batch 4 --json`"
)
def estimate(
    workspace: WorkspaceOption = HERE,
    vram: Annotated[
        float, typer.Option(min=1, max=10_000, metavar="GB", help="Memory of the card, as sold.")
    ] = 24.0,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Estimate for square images of this side.  Default: the workspace's buckets.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per micro-batch.  Default: train_batch_size.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Estimate training's peak memory on a GPU, part by part; needs neither a GPU nor weights."""
    import omnigen_pipe.memory.report as memory

    opened, progress = _open(workspace, quiet)
    report = memory.run(opened, progress, vram, resolution, batch)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        memory.show(report)


@app.command(
    "eval",
    epilog="Examples:  \n"
    "`omnigen-pipe eval`  \n"
    "`omnigen-pipe eval --base runs/default/checkpoints/step-*`  \n"
    "`omnigen-pipe eval runs/other --run default --json`",
)
def evaluate(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Adapter files, checkpoint folders, or run folders: their newest checkpoint.  "
            "Default: the configured run."
        ),
    ] = None,
    workspace: WorkspaceOption = HERE,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Evaluate on the frozen samples of this run.  Default: the configured run.",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the base model without an adapter as well.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate adapters at fixed times and noise, so that the losses of any two compare."""
    from omnigen_pipe.training import scoring

    opened, progress = _open(workspace, quiet)
    scores = scoring.score(
        opened, progress, adapters or [], run_name=run, base=base, device_name=device
    )
    if as_json:
        print(json.dumps([score.as_json() for score in scores], indent=2))
    else:
        scoring.show(scores, opened.root)


def _check_machine(device: str | None) -> None:
    """Raise `UsageError`, before hours of work, where all five stages could not run: under
    torchrun, or on a `device` that is not there."""
    from omnigen_pipe.training.processes import from_environment

    if from_environment().size > 1:
        raise UsageError(
            "torchrun starts `omnigen-pipe train` only. Run the other stages once, without it."
        )
    if device is not None:
        from omnigen_pipe.device import pick_device

        pick_device(device)


def _run_stages(
    opened: Workspace, progress: Progress, device: str | None, shown: bool
) -> list[Summary]:
    """All five stages in order, each summary `shown` as it comes; stops after one that failed."""
    import stages.bucket
    import stages.discover
    import stages.encode_vae
    import stages.tokenize
    import stages.train
    from omnigen_pipe.summary import show

    steps: tuple[Callable[[], Summary], ...] = (
        lambda: stages.discover.run(opened, progress),
        lambda: stages.bucket.run(opened, progress),
        lambda: stages.encode_vae.run(opened, progress, device=device),
        lambda: stages.tokenize.run(opened, progress),
        lambda: stages.train.run(opened, progress, device=device),
    )
    stages.train.check(opened)  # before hours of other stages
    summaries: list[Summary] = []
    for step in steps:
        summaries.append(step())
        if shown:
            show(summaries[-1])
        if summaries[-1].failed or summaries[-1].signal is not None:
            break
    if shown and not any(summary.changed or summary.failed for summary in summaries):
        print("Everything was up to date: no work was done.")
    return summaries


@app.command(epilog="Examples:  \n`omnigen-pipe run`  \n`omnigen-pipe run -w my-project --json`")
def run(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do all five stages, skipping what is done."""
    opened, progress = _open(workspace, quiet)
    _check_machine(device)
    summaries = _run_stages(opened, progress, device, shown=not as_json)
    if as_json:
        print(json.dumps([summary.as_json() for summary in summaries], indent=2, default=str))
    _leave(summaries, strict)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe verify`  \n"
    "`omnigen-pipe verify --quick`  \n"
    "`omnigen-pipe verify --repair`, then `omnigen-pipe encode-vae`"
)
def verify(
    workspace: WorkspaceOption = HERE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare the sizes of shards only; read nothing.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mark damaged latents, so that encode-vae makes them again."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check every shard and manifest against what was written; status 1 where one is damaged."""
    import omnigen_pipe.maintenance.verify

    opened, progress = _open(workspace, quiet)
    summary = omnigen_pipe.maintenance.verify.run(opened, progress, quick=quick, repair=repair)
    _report(summary, as_json, strict=False)


@app.command(epilog="Examples:  \n`omnigen-pipe demo`  \n`omnigen-pipe demo -w /tmp/demo`")
def demo(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Folder that the demo is written into.")
    ] = Path("demo"),
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Teach the embedded model a new shape by all five stages, and measure it; no download."""
    from omnigen_pipe.demo.project import write_project
    from omnigen_pipe.progress import Progress

    _check_machine(device)
    write_project(workspace, Progress(quiet))
    opened, progress = _open(workspace, quiet)
    summaries = _run_stages(opened, progress, device, shown=not as_json)
    if as_json and any(summary.failed or summary.signal is not None for summary in summaries):
        print(json.dumps({"stages": [s.as_json() for s in summaries]}, indent=2, default=str))
    _leave(summaries, strict=False)
    from omnigen_pipe.demo.proof import DRAWING, GRID_NAME, prove
    from omnigen_pipe.stop import Stopped

    adapter = Path(str(summaries[-1].details["adapter"]))
    try:
        proof = prove(opened, adapter, progress, device)
    except Stopped as stop:
        said = "Stopped: the adapter is trained, and not measured. Run the same command to go on."
        progress.note(said, always=True)
        if as_json:
            stages = [summary.as_json() for summary in summaries]
            told = {"stages": stages, "proof": None, "signal": stop.signal}
            print(json.dumps(told, indent=2, default=str))
        raise typer.Exit(128 + stop.signal) from None
    grid = opened.root / GRID_NAME
    if as_json:
        stages = [summary.as_json() for summary in summaries]
        result = {"stages": stages, "proof": proof.as_json(), "grid": str(grid)}
        print(json.dumps(result, indent=2, default=str))
        return
    print("\n" + "\n".join(proof.sentences()))
    print(f"Before and after: {grid}")
    print(f"The adapter lies at {adapter}")
    # Without an activated environment the bare name would not be found.
    command = "omnigen-pipe" if shutil.which("omnigen-pipe") else sys.argv[0]
    print(
        f"Draw with it:  {command} generate -w {shlex.quote(str(workspace))} "
        f"--adapter {shlex.quote(str(adapter))} --guidance {DRAWING['guidance_scale']:g} "
        f"--steps {DRAWING['num_inference_steps']} "
        '"a large red zorp on a black background" -o zorp.png'
    )


PicturePanel = "What the pictures are"
FilePanel = "Where they go"
ModelPanel = "What draws them"


@app.command(
    epilog="Examples:  \n"
    '`omnigen-pipe generate "a red circle on a black background" -o out.png`  \n'
    "`omnigen-pipe generate --adapter runs/default --strength 0 --strength 1 --grid grid.png`  \n"
    '`omnigen-pipe generate "a cat" "a dog" --model Shitao/OmniGen-v1-diffusers --count 4 '
    "--size 768x1024 -o pets`"
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
            help="Folder with omnigen-pipe.toml, whose model and validation prompts are taken.  "
            "Default: the current one.",
            rich_help_panel=ModelPanel,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
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
            help="Size in pixels, multiples of 16.  Default: the model's, else 1024x1024.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps from noise to picture.  Default: the model's, else 50.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How strongly to follow the prompt; 1 is without guidance.  "
            "Default: the model's, else 2.5.",
            rich_help_panel=PicturePanel,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**62,
            help="Seed of each prompt's first picture; the next has the next.",
            rich_help_panel=PicturePanel,
        ),
    ] = 0,
    count: Annotated[
        int, typer.Option(min=1, help="Pictures of each prompt.", rich_help_panel=PicturePanel)
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
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
            metavar="FILE", help="Put all pictures on one grid.", rich_help_panel=FilePanel
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
    opened = _model_workspace(workspace, model)
    _check_revision(revision, model)
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
    _report(summary, as_json, strict=False)


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


def _check_revision(revision: str | None, model: str | None) -> None:
    """Raise `UsageError` where `--revision` has no hub id beside it."""
    from omnigen_pipe.model_files import Model

    if revision is None:
        return
    if model is None:
        raise UsageError(
            f"--revision {revision} is of the model that --model names. That of a workspace is "
            "`revision` in [model] of its configuration."
        )
    if Model(model, Path.cwd()).is_local:
        raise UsageError(f"--revision {revision}: {model} is on this machine, not on the hub.")


def _model_workspace(workspace: Path | None, model: str | None) -> Workspace | None:
    """The workspace whose model is taken; None where `model` names one."""
    from omnigen_pipe.config import CONFIG_NAME
    from omnigen_pipe.workspace import Workspace

    if model is not None:
        if workspace is not None:
            raise UsageError(
                f"--model is {model} and --workspace is {workspace}: the model is the workspace's, "
                "or the one that is named. Give one of them."
            )
        return None
    if workspace is None and not (HERE / CONFIG_NAME).is_file():
        raise UsageError(
            f"There is no {CONFIG_NAME} here that would name a model. Name one with --model "
            "(a hub id, a folder or `embedded`), or a workspace with --workspace."
        )
    return Workspace.open(workspace or HERE)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe inspect runs/default`  \n"
    "`omnigen-pipe inspect runs/default/checkpoints/step-00001000/adapter.safetensors`"
)
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="An adapter's file, a checkpoint's folder, or a run's: its newest checkpoint."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what an adapter file holds: configuration, modules, size and strength of the change."""
    from omnigen_pipe.model.inspection import inspect_adapter, show_report
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.runs.checkpoints import locate_adapter

    file, passed_over = locate_adapter(adapter)
    report = inspect_adapter(file)
    for sentence in passed_over:
        Progress().note(sentence, always=True)
    if as_json:
        print(json.dumps({**report.as_json(), "notes": passed_over}, indent=2))
    else:
        show_report(report)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe export runs/default -o merged`  \n"
    "`omnigen-pipe export adapter.safetensors -o merged --model Shitao/OmniGen-v1-diffusers "
    "--strength 0.8`  \n"
    "`omnigen-pipe export runs/default -o for-omnigen --layout omnigen --ema`"
)
def export(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="An adapter's file, a checkpoint's folder, or a run's: its newest checkpoint."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to be made.")
    ],
    layout: Annotated[
        Literal["diffusers", "omnigen"],
        typer.Option(
            help="As diffusers reads a model, or as the authors' code does (Shitao/OmniGen-v1). "
            "In the latter q, k and v are one weight, and three Kronecker products do not join "
            "into one: an adapter can only be had merged there."
        ),
    ] = "diffusers",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(
            help="What the transformer's weights are rounded to.  Default: as the base has them."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="1: as trained; 0.5: half of the change.")] = 1.0,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the average in the run's or checkpoint's folder.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The base model: a hub id or folder.  Default: the workspace's.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Branch, tag or commit of the hub id that --model names."
        ),
    ] = None,
    any_base: Annotated[
        bool,
        typer.Option(
            "--any-base", help="Merge also into another base than the adapter was trained on."
        ),
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace",
            "-w",
            help="Folder with omnigen-pipe.toml, whose model is taken.  Default: the current one.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest weight file in diffusers' layout, such as 500MB.  Default: 5GB.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FOLDER where it is an earlier export.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge an adapter into its base model, and write the result as a model of its own."""
    from omnigen_pipe.export.exporting import run
    from omnigen_pipe.export.weight_files import parse_size
    from omnigen_pipe.model_files import Model
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.runs.checkpoints import locate_adapter

    opened = _model_workspace(workspace, model)
    _check_revision(revision, model)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    file, passed_over = locate_adapter(adapter, ema)
    summary = run(
        file,
        output,
        Progress(quiet),
        base=Model.of(opened) if opened else Model(model or "", Path.cwd(), revision),
        workspace=opened,
        layout=layout,
        dtype=dtype,
        strength=strength,
        limit=limit,
        any_base=any_base,
        overwrite=overwrite,
    )
    summary.notes[:0] = passed_over
    _report(summary, as_json, strict=False)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe status`  \n"
    "`omnigen-pipe status --quick --json`  \n"
    "`omnigen-pipe status --sample cats/tabby.jpg`"
)
def status(
    workspace: WorkspaceOption = HERE,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Explain one sample, from file to batch: a sample_id or its beginning, or a path.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Do not look into image folders: trust images.parquet."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is current, missing, failed and unused, why, and what a run would do."""
    import omnigen_pipe.maintenance.status as standing

    opened, progress = _open(workspace, quiet)
    if sample is not None:
        from omnigen_pipe.maintenance import explanation

        explained = explanation.explain(opened, sample)
        if as_json:
            print(json.dumps(explained, indent=2))
        else:
            explanation.show(explained)
        return
    found = standing.run(opened, progress, quick=quick)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        standing.show(found)


@app.command(
    epilog="Examples:  \n"
    "`omnigen-pipe gc`  \n"
    "`omnigen-pipe gc --yes`  \n"
    "`omnigen-pipe gc --yes --grace-hours 0`"
)
def gc(
    workspace: WorkspaceOption = HERE,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do it; without, only say what would go.")
    ] = False,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Delete only what has been unused for so long. Less than a run of any other "
            "command takes is safe only while none is at work.",
        ),
    ] = 24.0,
    live_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Rewrite shards of which less than this is needed."),
    ] = 0.5,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give back the space of latents that neither the configuration nor any run needs."""
    import omnigen_pipe.maintenance.gc as collection

    opened, progress = _open(workspace, quiet)
    summary = collection.run(
        opened, progress, yes=yes, grace_seconds=grace_hours * 3600, live_share=live_share
    )
    _report(summary, as_json, strict=False)


def main() -> None:
    """Run the command line; errors that a user can act on print one message."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Buckets of many sizes would fragment the GPU's memory. torch reads it when it starts.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        app()
    except PipeError as error:
        if not error.said:
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
