"""The prompts that are wanted besides captions: for dropout, for guidance, and for validation.

All three dropout prompts are always wanted: they cost nothing, and the option can then change
without tokenising again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from omnigen_pipe.config import Config
from omnigen_pipe.prompts.template import CFG_PROMPT, DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.workspace import Workspace


def negative_prompt(config: Config) -> str:
    """The caption that guidance steers away from: the configured one, else diffusers' own."""
    configured = config.validation.validation_negative_prompt
    return DIFFUSERS_NEGATIVE_PROMPT if configured is None else configured


def dropout_prompts(config: Config) -> dict[str, str]:
    """What a dropped caption becomes, for each value of `caption_dropout_prompt`."""
    return {"<cfg>": CFG_PROMPT, "empty": "", "negative": negative_prompt(config)}


def dropout_prompt(config: Config) -> str:
    """What a dropped caption becomes in this configuration."""
    return dropout_prompts(config)[config.train.caption_dropout_prompt]


def prompt_library(workspace: Workspace) -> dict[str, str]:
    """The prompts of `user_prompt_library` by nickname; empty where none is configured.

    Raises `UsageError` where the file is missing or is not a JSON object of valid texts.
    """
    configured = workspace.config.validation.user_prompt_library
    if configured is None:
        return {}
    return read_library(workspace.path(configured), "user_prompt_library")


def read_library(path: Path, option: str) -> dict[str, str]:
    """The prompts in the JSON file `path` by nickname; `option` is what messages call it.

    Raises `UsageError` where the file is missing or is not a JSON object of valid texts, or a
    nickname could not name a file.
    """
    where = f"{option} {path}"
    wanted = '{"nickname": "the prompt goes here"}'
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct)
    except FileNotFoundError as error:
        raise UsageError(f"{where} does not exist.") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{where} cannot be used: {error}. It must look like {wanted}.") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{where} holds a {type(raw).__name__}, but must look like {wanted}.")
    for nickname, prompt in raw.items():
        check_text(nickname, f"{where}: the nickname {json.dumps(nickname)}")
        if not any(character.isalnum() for character in nickname):
            raise UsageError(
                f"{where}: the nickname {json.dumps(nickname, ensure_ascii=False)} is none: "
                "pictures are named by it, so it must hold a letter or a digit."
            )
        if not isinstance(prompt, str):
            raise UsageError(
                f"{where}: the prompt of `{nickname}` is {json.dumps(prompt)}, but must be a text."
            )
        check_text(prompt, f"{where}: the prompt of `{nickname}`")
    return raw


def check_text(text: str, what: str) -> None:
    """Raise `UsageError` where `text`, which messages call `what`, is none that can be encoded.

    JSON can name half of a surrogate pair, and Python makes one of each byte of a command line
    that is not UTF-8: tokenizers and files take neither.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(
            f"{what} is no valid Unicode: its character {error.start + 1} is {half}, half of a "
            "pair or a byte that is not UTF-8. Write it as UTF-8."
        ) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"the name `{repeated[0]}` occurs twice")
    return dict(pairs)


def validation_prompts(workspace: Workspace) -> dict[str, str]:
    """The prompts of validation pictures by nickname: the main one is named `validation`.

    Raises `UsageError` as `prompt_library` does, and where the library uses that name too.
    """
    library = prompt_library(workspace)
    main = workspace.config.validation.validation_prompt
    if main is None:
        return library
    if "validation" in library:
        raise UsageError(
            f"user_prompt_library {workspace.config.validation.user_prompt_library}: the nickname "
            "`validation` belongs to validation_prompt. Choose another nickname."
        )
    return {"validation": main, **library}


def prompts_besides_captions(workspace: Workspace) -> list[str]:
    """All captions that are wanted besides those of samples, each once, in a fixed order."""
    config = workspace.config
    prompts = [*dropout_prompts(config).values(), *validation_prompts(workspace).values()]
    return list(dict.fromkeys(prompts))
