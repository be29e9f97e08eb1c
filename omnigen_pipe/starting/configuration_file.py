"""The commented `omnigen-pipe.toml`: every key there is, with its meaning above it.

Keys that are set stand as they are; the others stand behind a `#` with their default, or with
an example where there is none. Made from the configuration's own models, so that a key that is
added there appears here. Comments are a `#` and a space, keys that are off a `#` alone: taking
every such `#` away leaves a valid file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from manifests.errors import UsageError
from omnigen_pipe import config as configuration
from omnigen_pipe.config import (
    CONFIG_NAME,
    Config,
    DatasetConfig,
    DatasetOptions,
    WebhookConfig,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_WIDTH = 96
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")

_HEADER = """\
Configuration of omnigen-pipe. All keys are here: those behind a `#` are off and show their
default. Take the `#` away to set one. `omnigen-pipe run` does what this file says."""

#: What stands behind the `#` of a key that has no default.
_EXAMPLES: dict[str, Any] = {
    "revision": "main",
    "pretrained_vae_model_name_or_path": "path/to/vae",
    "instance_prompt": "a photo of my subject",
    "id": "images",
    "instance_data_dir": "images",
    "type": "list",
    "list_file": "captions.jsonl",
    "validation_prompt": "a photo of a cat",
    "user_prompt_library": "prompts.json",
    "validation_negative_prompt": "blurry",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 2.5,
    "validation_num_inference_steps": 30,
    "lycoris_config": "lycoris_config.json",
    "hub_model_id": "OWNER/NAME",
    "model_card_note": "What this adapter is good for.",
    "model_card_trigger_words": ["a photo of my subject"],
    "url_env": "WEBHOOK_URL",
}


def toml_value(value: Any) -> str:
    """`value` as TOML on one line: texts, numbers, lists, and tables whose None are left out."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        # 1024.0 is written 1024, and 1e-08 is written 1e-8: the models take both for a float.
        text = repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        return re.sub(r"e([+-])0+(\d)", r"e\1\2", text)
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = [
            f"{_key(str(name))} = {toml_value(item.model_dump(exclude_none=True))}"
            if isinstance(item, BaseModel)
            else f"{_key(str(name))} = {toml_value(item)}"
            for name, item in value.items()
            if item is not None
        ]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    raise TypeError(f"{value!r} cannot be written as TOML")


def _key(name: str) -> str:
    return name if _BARE_KEY.match(name) else toml_value(name)


def render(values: dict[str, Any]) -> str:
    """The file's text in which exactly `values`, shaped as the file is, are set."""
    blocks = [_comment(_HEADER)]
    for name, field in Config.model_fields.items():
        if name == "defaults":
            blocks.append(_table("defaults", DatasetOptions, values.get(name, {})))
        elif name == "dataset":
            blocks += _datasets(values.get(name, []))
        elif name == "webhook":
            blocks += _webhooks(values.get(name, []))
        else:
            model = field.annotation
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)
            blocks.append(_table(name, model, values.get(name, {})))
    return "\n\n".join(blocks) + "\n"


def _datasets(datasets: list[dict[str, Any]]) -> list[str]:
    """One block per dataset; the first explains the keys, and without any it is an example."""
    own = {
        n: f for n, f in DatasetConfig.model_fields.items() if n not in DatasetOptions.model_fields
    }
    blocks = []
    for position, dataset in enumerate(datasets or [{}]):
        lines = []
        if position == 0:
            lines.append(_comment(_doc(DatasetConfig)))
            lines.append(_comment("Any key of [defaults] may stand here too, for this one alone."))
        lines.append("[[dataset]]" if dataset else "#[[dataset]]")
        for name, field in own.items():
            if position == 0:
                lines.append(_comment(_meaning(name, field)))
            if position == 0 or name in dataset:
                lines.append(_entry(name, field, dataset))
        for name, value in dataset.items():
            if name not in own:
                lines.append(f"{_key(name)} = {toml_value(value)}")
        blocks.append("\n".join(lines))
    return blocks


def _webhooks(webhooks: list[dict[str, Any]]) -> list[str]:
    """One block per webhook; the first explains the keys, and without any it is an example."""
    blocks = []
    for position, webhook in enumerate(webhooks or [{}]):
        lines = [_comment(_doc(WebhookConfig))] if position == 0 else []
        lines.append("[[webhook]]" if webhook else "#[[webhook]]")
        for name, field in WebhookConfig.model_fields.items():
            if position == 0:
                lines.append(_comment(f"{name}: {_meaning(name, field)}"))
            # Of url and url_env there is only one: switched on, both would contradict each other.
            other = name == "url" or (name == "url_env" and "url" in webhook)
            if name in webhook or (position == 0 and not other):
                lines.append(_entry(name, field, webhook))
        blocks.append("\n".join(lines))
    return blocks


def _table(path: str, model: type[BaseModel], values: dict[str, Any]) -> str:
    """The block of one table, its sub-tables last as TOML wants it."""
    lines = [_comment(_doc(model)), f"[{path}]"]
    tables = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            tables.append(_table(f"{path}.{name}", field.annotation, values.get(name, {})))
            continue
        lines.append(_comment(_meaning(name, field)))
        lines.append(_entry(name, field, values))
    return "\n\n".join(["\n".join(lines), *tables])


def _entry(name: str, field: FieldInfo, values: dict[str, Any]) -> str:
    """`name = value`, behind a `#` where it is not set."""
    if name in values:
        return f"{_key(name)} = {toml_value(values[name])}"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default is PydanticUndefined:
        default = _EXAMPLES[name] if name in _EXAMPLES else _example(field.annotation)
    return f"#{_key(name)} = {toml_value(default)}"


def _example(annotation: Any) -> Any:
    """A value of this type, for a key without default that `_EXAMPLES` does not name."""
    choices = _choices(annotation)
    if choices:
        return choices[0]
    for kind, example in ((bool, False), (int, 1), (float, 1.0), (str, "")):
        if annotation is kind or kind in get_args(annotation):
            return example
    raise TypeError(f"no example for {annotation}; add one")


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of an optional one; else none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(c for argument in get_args(annotation) for c in _choices(argument))
    return ()


def _meaning(name: str, field: FieldInfo) -> str:
    """The sentences above a key: what it means, what is allowed, and whether it has a default."""
    text = field.description or name
    choices = [str(choice) for choice in _choices(field.annotation)]
    if len(choices) > 1 and not all(f"`{choice}`" in text for choice in choices):
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    for argument in get_args(field.annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            keys = [f"`{n}`: {f.description}" for n, f in argument.model_fields.items()]
            text += " Keys: " + " ".join(keys)
    if field.is_required():
        text += " Required."
    elif field.get_default(call_default_factory=True, validated_data={}) is None:
        text += " (Off unless set.)"
    return text


def _doc(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or model.__name__).split())


def _comment(text: str) -> str:
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, _WIDTH)]
    return "\n".join(f"# {line}" for line in lines)


def write(root: Path, values: dict[str, Any]) -> Path:
    """Write the configuration of the new workspace `root`; returns the file's path.

    Raises `UsageError`, with nothing written, where one is there already or the values are not
    a valid configuration.
    """
    path = root / CONFIG_NAME
    text = render(values)
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{error.object[error.start - 40 : error.end]!a} is not UTF-8.") from error
    configuration.parse(tomllib.loads(text), path)
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Name a folder for the workspace.")
    root.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as handle:
            handle.write(encoded)
    except FileExistsError as error:
        raise _existing(path) from error
    return path


def refuse_existing(root: Path) -> None:
    """Raise the `UsageError` that `write` would end with where there is a configuration already.

    For asking before anybody has answered questions in vain.
    """
    if os.path.lexists(path := root / CONFIG_NAME):
        raise _existing(path)


def _existing(path: Path) -> UsageError:
    return UsageError(
        f"{path} is there already, and is never overwritten. Edit it, move it away, or name "
        "another folder."
    )
