"""`init`: the configuration of a new workspace, asked for or converted."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manifests.errors import UsageError
from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import HERE, JsonOption, given_path

if TYPE_CHECKING:
    from omnigen_pipe.starting.answers import Answers
    from omnigen_pipe.starting.proposals import Proposal
    from omnigen_pipe.starting.questions import Question

FolderArgument = Annotated[
    Path | None,
    typer.Argument(
        parser=given_path, help="Folder of the new workspace.  Default: the current one."
    ),
]
SettingPanel = "Settings (asked for on a terminal, else proposed by what is found)"
SimpleTunerPanel = "From SimpleTuner"


@command(
    "init",
    epilog="Examples:  \n"
    "`omnigen-pipe init my-project`  \n"
    "`omnigen-pipe init my-project --images ~/photos`  \n"
    "`omnigen-pipe init my-project --images ~/photos --caption-strategy textfile --yes`  \n"
    "`omnigen-pipe init my-project --from-simpletuner SimpleTuner/config/config.json`",
)
def init(
    folder: FolderArgument = None,
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", "-w", parser=given_path, help="The same as FOLDER."),
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
            help="Where captions come from: filename, textfile, instanceprompt, or jsonl, csv or "
            "parquet where the folder holds such a table.",
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
    repeats: Annotated[
        int | None,
        typer.Option(
            min=0, help="Extra times per epoch, of every dataset.", rich_help_panel=SettingPanel
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
        bool, typer.Option("--yes", "-y", help="Ask nothing: take what is proposed.")
    ] = False,
    from_simpletuner: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="CONFIG.JSON",
            help="Convert SimpleTuner's config.json and the files that it names.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    dataloader: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="The dataloader's JSON file, where config.json does not lead to it.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    lycoris: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="lycoris_config.json, where config.json does not lead to it.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    relative_to: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="Where relative paths in the JSON files start.  Default: SimpleTuner's folder.",
            rich_help_panel=SimpleTunerPanel,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented omnigen-pipe.toml, from answers or from SimpleTuner's files.

    Looks into the folders of images and proposes resolution, captions, repeats and batch size by
    what is there.
    """
    from omnigen_pipe.starting.answers import configured
    from omnigen_pipe.starting.configuration_file import refuse_existing, write

    if folder is not None and workspace is not None and folder != workspace:
        raise UsageError(f"FOLDER is {folder} and --workspace is {workspace}: give one of them.")
    root = (folder or workspace or HERE).absolute()
    given: dict[str, object] = {
        "images": images,
        "caption_strategy": caption_strategy,
        "instance_prompt": instance_prompt,
        "resolution": resolution,
        "repeats": repeats,
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
        if dataloader or lycoris or relative_to:
            raise UsageError(
                "--dataloader, --lycoris and --relative-to only go with --from-simpletuner."
            )
        refuse_existing(root)
        on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        asking = on_terminal and not yes and not as_json
        answers, said = _interviewed(given, root, asking, as_json)
        values = configured(answers, root, Path.cwd())
        path = write(root, values)
        if as_json:
            found = [each.contents.as_json() for each in answers.datasets if each.contents]
            report = {"written": str(path), **values, "found": found, "notes": said}
            print(json.dumps(report, indent=2))
    if not as_json:
        where = "" if root == Path.cwd() else f" -w {shlex.quote(str(folder or workspace))}"
        print(f"Wrote {path}. Look through it, then:  omnigen-pipe run{where}")


def _interviewed(
    given: dict[str, object], root: Path, asking: bool, as_json: bool
) -> tuple[Answers, list[str]]:
    """All answers, and what was said of them, which is printed unless `as_json`.

    Leaves with status 130, as after the signal, where Ctrl-C or the end of input is the answer.
    """
    from omnigen_pipe.starting.folders import check_folder, is_there, look
    from omnigen_pipe.starting.questions import Surroundings, answered

    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        if not as_json:
            # Names of files are shown, and may hold what a terminal takes for commands.
            print("".join(c if c.isprintable() else "?" for c in sentence), flush=True)

    here = Path.cwd()
    around = Surroundings(
        look=lambda images: look(images, root, here, say),
        batch=lambda answers: _batch(answers, root, say),
        say=say,
        check_folder=lambda images: check_folder(images, root, here),
        is_there=lambda images: is_there(images, root, here),
        longest_side=lambda model: _longest_side(model, here),
    )
    try:
        return answered(given, _ask if asking else None, around), said
    except (typer.Abort, KeyboardInterrupt) as error:
        print("\nNothing was written.", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from error


def _longest_side(model: str, here: Path) -> int | None:
    """What a `model` takes whose files are at hand; nothing is fetched."""
    from omnigen_pipe.model_files import Model, longest_side, transformer_config

    folder = Model(model, here).local_part("transformer")
    return None if folder is None else longest_side(transformer_config(folder))


def _batch(answers: Answers, root: Path, say: Callable[[str], None]) -> Proposal:
    """The batch size that the GPU that is here can hold."""
    from omnigen_pipe import config
    from omnigen_pipe.starting.answers import configured
    from omnigen_pipe.starting.proposals import Proposal
    from omnigen_pipe.workspace import Workspace

    values = configured(answers, root, Path.cwd())
    workspace = Workspace(root, config.parse(values, root / config.CONFIG_NAME))
    say("Looking for a GPU and estimating what it can hold, which may take half a minute.")
    from omnigen_pipe.memory.batch import proposed_batch

    return Proposal(*proposed_batch(workspace))


def _ask(question: Question) -> object:
    """The answer typed at the terminal; an empty one is the default."""
    if isinstance(question.default, bool):
        return typer.confirm(question.text, default=question.default)

    def value(typed: str) -> object:
        try:
            return question.read(str(typed))
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error

    text = question.text
    if question.choices:
        text += f" ({', '.join(question.choices)})"
    shown = question.default != ""
    return typer.prompt(text, default=question.default, value_proc=value, show_default=shown)
