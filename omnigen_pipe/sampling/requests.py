"""What is to be drawn: a prompt and a seed for each picture, and settings for all of them.

The options come first, then what a workspace says, then what the model's makers say.

A picture's noise comes from its seed alone, so neither the size of a batch nor its neighbours
change it. Imports no torch: wrong requests are refused before anything is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from manifests.errors import UsageError
from omnigen_pipe.config import Config, parsed_sizes
from omnigen_pipe.prompts.library import check_text, read_library, validation_prompts
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.workspace import Workspace

#: Sides of pictures are multiples of this: 8 pixels a latent, 2x2 latents a token.
ALIGNMENT = 16
#: Beside `model_index.json`: how a model's makers want it to be used.
DEFAULTS_NAME = "generation.json"
#: Characters of a prompt that name its picture's file.
_NAME_LENGTH = 60


class Settings(BaseModel):
    """How pictures are drawn; the keys of `generation.json`. Sides are in pixels.

    The defaults are those of diffusers' `OmniGenPipeline`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    width: int = Field(1024, ge=ALIGNMENT, multiple_of=ALIGNMENT)
    height: int = Field(1024, ge=ALIGNMENT, multiple_of=ALIGNMENT)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(2.5, ge=0)
    negative_prompt: str = DIFFUSERS_NEGATIVE_PROMPT

    @field_validator("negative_prompt")
    @classmethod
    def _usable(cls, text: str) -> str:
        try:
            check_text(text, "it")
        except UsageError as error:
            raise ValueError(str(error).removesuffix(".")) from error
        if _asks_for_image(text):
            raise ValueError("it asks for an input image, and none can be given")
        return text

    @property
    def size(self) -> str:
        """`WIDTHxHEIGHT`."""
        return f"{self.width}x{self.height}"

    def changed(self, values: Mapping[str, object], where: str) -> Settings:
        """These settings with `values` in place of some; `where` is what messages call them.

        Raises `UsageError` where a value or a key cannot be used.
        """
        try:
            return Settings.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            why = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{where}: {key}: {why}.") from error


@dataclass(frozen=True)
class Request:
    """One picture: `name` is distinct for each prompt and can be part of a file's name.

    `strength` is that of the adapter, times the one it was trained at; None without an adapter.
    """

    name: str
    prompt: str
    seed: int
    strength: float | None = None

    @property
    def stem(self) -> str:
        """What its file is called, without the suffix, where one strength is drawn."""
        return f"{self.name}-{self.seed}"


def model_settings(path: Path | None) -> Settings:
    """The settings in the `generation.json` at `path`; the defaults where there is none."""
    if path is None:
        return Settings()
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be used: {error}. Fetch the model again.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a JSON object. Fetch the model again.")
    return Settings().changed(values, str(path))


def parsed_size(text: str) -> dict[str, int]:
    """`width` and `height` of a size as it is typed; raises `UsageError` where it cannot be."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if match is None:
        raise UsageError(f"--size {text}: write it as WIDTHxHEIGHT in pixels, such as 1024x768.")
    sides = [int(side) for side in match.groups()]
    nearest = [max(1, (side + ALIGNMENT // 2) // ALIGNMENT) * ALIGNMENT for side in sides]
    if sides != nearest:
        raise UsageError(
            f"--size {text}: sides must be multiples of {ALIGNMENT}. The nearest is "
            f"{nearest[0]}x{nearest[1]}."
        )
    return {"width": sides[0], "height": sides[1]}


def exact(number: float) -> str:
    """`number` as text that is read again as the same number; whole ones without a point."""
    return repr(float(number)).removesuffix(".0")


def _asks_for_image(prompt: str) -> bool:
    return "<|image_" in prompt


def chosen_settings(
    own: Settings, workspace: Workspace | None, options: Mapping[str, object]
) -> Settings:
    """How pictures are drawn: `options`, else what `workspace` says, else the model's `own`.

    `workspace` is None where the model is not a workspace's.
    """
    settings = own if workspace is None else validation_settings(own, workspace.config)[0]
    return settings.changed(options, "The options")


def validation_settings(own: Settings, config: Config) -> list[Settings]:
    """How validation pictures are drawn, for each `validation_resolution`: as `config` says, else
    as the model's `own` settings do. Raises `UsageError` where a value cannot be used."""
    validation = config.validation
    chosen = {
        "negative_prompt": validation.validation_negative_prompt,
        "guidance_scale": validation.validation_guidance,
        "num_inference_steps": validation.validation_num_inference_steps,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = own.changed(given, "[validation]")
    if validation.validation_resolution is None:
        return [settings]
    return [
        settings.changed({"width": width, "height": height}, "[validation]")
        for width, height in parsed_sizes(validation.validation_resolution)
    ]


def chosen_requests(
    workspace: Workspace | None,
    prompts: Sequence[str],
    library: Path | None,
    seed: int | None,
    count: int,
) -> list[Request]:
    """The pictures that are asked for; without prompts, the validation prompts of `workspace`.

    As `requests_of`; without a `seed` that of `workspace` counts, else 0. Raises `UsageError`
    where there is none.
    """
    if seed is None:
        seed = 0 if workspace is None else workspace.config.validation.validation_seed
    by_nickname = read_library(library, "--prompt-library") if library is not None else {}
    if not prompts and library is None and workspace is not None:
        by_nickname = validation_prompts(workspace)
    if not prompts and not by_nickname:
        raise UsageError(
            "There is nothing to draw. Give a prompt, such as "
            '`omnigen-pipe generate "a red circle"`, or a file with --prompt-library.'
        )
    return requests_of(prompts, by_nickname, seed, count)


def at_strengths(requests: Sequence[Request], strengths: Sequence[float]) -> list[Request]:
    """`requests` once for each of `strengths`, all of one strength together."""
    return [
        replace(request, strength=strength)
        for strength in dict.fromkeys(strengths)
        for request in requests
    ]


def requests_of(
    prompts: Sequence[str], library: Mapping[str, str], seed: int, count: int
) -> list[Request]:
    """`count` pictures of each prompt, then of each prompt of `library`, which is by nickname.

    The i-th picture of every prompt has the seed `seed` + i. Raises `UsageError` for prompts that
    speak of input images or are no valid Unicode.
    """
    for prompt in prompts:
        check_text(prompt, f"The prompt {json.dumps(prompt)}")
    named = [(readable_name(prompt), prompt) for prompt in prompts]
    named += [(readable_name(nickname, lower=False), text) for nickname, text in library.items()]
    requests: list[Request] = []
    taken: set[str] = set()
    for name, prompt in named:
        if _asks_for_image(prompt):
            raise UsageError(f"The prompt `{prompt}` asks for an input image: none can be given.")
        distinct, number = name, 2
        while distinct.casefold() in taken:
            distinct, number = f"{name}-{number}", number + 1
        taken.add(distinct.casefold())
        requests += [Request(distinct, prompt, seed + index) for index in range(count)]
    return requests


def readable_name(text: str, lower: bool = True) -> str:
    """The beginning of `text` as part of a file's name: letters, digits, `_` and `-`."""
    words = re.sub(r"[^\w-]+", "-", text.lower() if lower else text).strip("-_")
    short = words[:_NAME_LENGTH]
    if len(words) > _NAME_LENGTH and "-" in short:
        short = short[: short.rindex("-")]  # whole words
    # A file's name holds 255 bytes, and a letter may take four.
    return short.encode()[:200].decode(errors="ignore").strip("-_") or "picture"
