"""Validation pictures as they are wanted: which prompts and sizes, when, and in which files.

    runs/<name>/validation/step-000200/<nickname>-1024x1024.png
                                       <nickname>-1024x1024-ema.png
                                       previews/<nickname>-1024x1024-step-05.png

Which files a run lacks is known without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe.config import Config, ValidationConfig
from omnigen_pipe.prompts.library import validation_prompts
from omnigen_pipe.sampling.requests import (
    Request,
    Settings,
    at_strengths,
    requests_of,
    validation_settings,
)
from omnigen_pipe.workspace import Workspace

FOLDER_NAME, PREVIEWS_NAME = "validation", "previews"
#: Of a preview's file: the picture's own name, and the step of drawing.
_PREVIEW = re.compile(r"(?P<picture>.+)-step-\d{2,}\.png")


@dataclass(frozen=True)
class Wanted:
    """One picture of every validation, by the adapter or, with `average`, by its average."""

    request: Request
    settings: Settings
    average: bool

    @property
    def name(self) -> str:
        """The nickname, made fit for a file, and the size."""
        return f"{self.request.name}-{self.settings.size}"

    @property
    def label(self) -> str:
        """The name, and whether it is of the average: of all pictures, no two have the same."""
        return f"{self.name}-ema" if self.average else self.name

    def file(self, folder: Path, step: int) -> Path:
        """Its file after `step`, in the run's `folder`."""
        return folder / FOLDER_NAME / f"step-{step:06d}" / f"{self.label}.png"

    def preview_file(self, folder: Path, step: int, number: int) -> Path:
        """The file of its preview after `number` of the steps in which it is drawn."""
        picture = self.file(folder, step)
        digits = max(2, len(str(self.settings.num_inference_steps)))
        return picture.parent / PREVIEWS_NAME / f"{self.label}-step-{number:0{digits}d}.png"


def previews(folder: Path) -> Iterator[tuple[Path, str]]:
    """The previews in the run's `folder`, each with the name of its picture's file."""
    for step in sorted((folder / FOLDER_NAME).glob("step-*")):
        inner = step / PREVIEWS_NAME
        if step.is_symlink() or inner.is_symlink() or not inner.is_dir():
            continue
        for path in sorted(inner.iterdir()):
            if (found := _PREVIEW.fullmatch(path.name)) is not None:
                yield path, f"{found['picture']}.png"


def is_due(step: int, total_steps: int, config: Config) -> bool:
    """Whether there is a validation after `step` of a run of `total_steps`."""
    interval = config.validation.validation_step_interval
    return interval > 0 and (step % interval == 0 or step == total_steps)


def without_effect(options: ValidationConfig) -> str | None:
    """A sentence where something is asked of validations, and there are none."""
    asked = [
        name
        for name, is_asked in (
            ("validation_preview", options.validation_preview),
            ("evaluation_type", options.evaluation_type != "none"),
        )
        if is_asked
    ]
    if options.validation_step_interval or not asked:
        return None
    have = "has" if len(asked) == 1 else "have"
    return (
        f"{' and '.join(asked)} {have} no effect: validation_step_interval is 0, so nothing is "
        "drawn."
    )


def wanted(workspace: Workspace, own: Settings) -> list[Wanted]:
    """The pictures of a validation, the average's last; `own` are the model's settings.

    Raises `UsageError` where there is no prompt, or one cannot be drawn.
    """
    config = workspace.config
    prompts = validation_prompts(workspace)
    if not prompts:
        raise UsageError(
            "validation_step_interval is set, and there is nothing to draw: set validation_prompt "
            "or user_prompt_library, or validation_step_interval = 0."
        )
    requests = requests_of([], prompts, config.validation.validation_seed, 1)
    return [
        Wanted(request, settings, average)
        for average in ((False, True) if config.train.use_ema else (False,))
        for request in at_strengths(requests, [1.0])
        for settings in validation_settings(own, config)
    ]


def of_step(pictures: Sequence[Wanted], step: int) -> list[Wanted]:
    """Those of `pictures` that are drawn after `step`: before the first step the average is the
    adapter itself."""
    return [picture for picture in pictures if step > 0 or not picture.average]


def is_lacking(workspace: Workspace, own: Settings, folder: Path, step: int, total: int) -> bool:
    """Whether a validation is due after `step` of `total`, and not all of its files are in the
    run's `folder`."""
    if not is_due(step, total, workspace.config):
        return False
    pictures = of_step(wanted(workspace, own), step)
    return not all(picture.file(folder, step).is_file() for picture in pictures)
