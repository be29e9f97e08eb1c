"""Writes the reference pages of `docs/` from the code; `--check` says whether they are current.

`configuration.md` comes from the pydantic models, `manifests.md` from the Arrow schemas,
`commands.md` from the help texts, `simpletuner-keys.md` from the converter's tables. Run it after
changing any of these: `make docs`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from manifests.schema import MANIFESTS
from omnigen_pipe import config
from omnigen_pipe.cli import app
from omnigen_pipe.starting import simpletuner_keys

DOCS = Path(__file__).resolve().parent
MADE = "<!-- Made by docs/generate.py from the code: change that, then run `make docs`. -->\n"

#: Each table of the configuration file, with its model, in the file's order.
TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("[model]", config.ModelConfig),
    ("[[dataset]]", config.DatasetConfig),
    ("[pixels]", config.PixelsConfig),
    ("[vae]", config.VaeConfig),
    ("[prompts]", config.PromptsConfig),
    ("[validation]", config.ValidationConfig),
    ("[lokr]", config.LokrConfig),
    ("[lokr.apply_preset]", config.LokrPresetConfig),
    ("[lokr.apply_preset.module_algo_map.CLASS]", config.LokrModuleConfig),
    ("[train]", config.TrainConfig),
    ("[hub]", config.HubConfig),
    ("[[webhook]]", config.WebhookConfig),
)


def _kind(annotation: Any) -> str:
    """A type as a reader of TOML would say it."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    names[SecretStr] = "text"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in names:
        return names[annotation]
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    # An optional value: say what it is when it is there.
    return _kind(next(a for a in arguments if a is not type(None)))


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "see its own table" if field.default_factory else "**required**"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def configuration() -> str:
    """The page of every key."""
    lines = [
        "# Configuration, key by key",
        MADE,
        "One TOML file, `omnigen-pipe.toml`, in the workspace. Every key is optional unless it "
        "says otherwise; an unknown key is an error that names the nearest known one. Keys of "
        "`[[dataset]]` up to `maximum_pixels` may also stand in `[defaults]`, for every dataset "
        "that does not set its own.",
    ]
    for title, model in TABLES:
        lines += [f"\n## {title}\n", (model.__doc__ or "").strip(), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            kind, default = _cell(_kind(field.annotation)), _cell(_default(field))
            lines.append(f"| `{name}` | {kind} | {default} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def manifests() -> str:
    """The page of every column."""
    lines = [
        "# Manifests, column by column",
        MADE,
        "Parquet tables in the workspace's `manifests/`. *Snapshots* (`images.parquet`, "
        "`samples.parquet`) are one file each, replaced whole. *Logs* (`files/`, `latents/`, "
        "`prompts/`) are folders of fragments that only grow. Every file carries as key-value "
        "metadata, prefixed `omnigen_pipe.`: `schema_version`, `stage`, `manifest`, "
        "`tool_version`, `created_at`, and the `fingerprint` of what it was made from; "
        "`images.parquet` and `samples.parquet` also the options that they depend on (`settings`), "
        "`samples.parquet` those of them that changed last (`changes`), and fragments of latents "
        "and prompts what their keys are made of (`inputs`), all as JSON; `samples.parquet` also "
        "the BLAKE3 of the `images.parquet` that it was made from (`images_blake3`). Columns may "
        "be added in later versions; these keep name and meaning.",
    ]
    for manifest in MANIFESTS:
        key = ", ".join(f"`{name}`" for name in manifest.key)
        lines += [f"\n## {manifest.name}\n", f"Written by `{manifest.stage}`. {manifest.doc}", ""]
        lines += [f"Key: {key}.", "", "| column | type | meaning |", "|---|---|---|"]
        for field in manifest.schema:
            kind = str(field.type).replace("element: ", "").replace("item: ", "")
            doc = field.metadata[b"doc"].decode()
            lines.append(f"| `{field.name}` | {kind} | {_cell(doc)} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The page of every command, with every option."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", MADE, group.help]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(f"[{p.name.upper()}]" for p in arguments)
        lines += [f"\n## omnigen-pipe {name}\n", command.help, ""]
        lines += [f"    omnigen-pipe {name} [OPTIONS] {usage}".rstrip(), ""]
        lines += ["| option | meaning |", "|---|---|"]
        for parameter in command.params:
            options = [*parameter.opts, *parameter.secondary_opts]
            shown = ", ".join(f"`{option}`" for option in options)
            if parameter in arguments:
                shown = f"`{parameter.name.upper()}`"
            lines.append(f"| {shown} | {_cell(parameter.help or '')} |")
        if command.epilog:
            lines += ["", command.epilog]
    return "\n".join(lines) + "\n"


def converted_keys() -> str:
    """The page of what the converter knows of SimpleTuner's keys."""
    values = {
        f"{key} = {value}": note for (key, value), (_, note) in simpletuner_keys.VALUES.items()
    }
    renamed = {key: f"`{name}`" for key, name in simpletuner_keys.SPELLINGS.items()}
    optimizers = {
        f"optimizer = {there}": f"`{here}`" for there, here in simpletuner_keys.OPTIMIZERS.items()
    }
    parts = {
        "The same here, with a remark": simpletuner_keys.REMARKS,
        "Another name here": renamed | optimizers,
        "Taken over, and different": simpletuner_keys.CHANGES | values,
        "Not needed": simpletuner_keys.NOT_NEEDED,
        "Without effect there": simpletuner_keys.WITHOUT_EFFECT,
        "Not supported": simpletuner_keys.NOT_SUPPORTED,
    }
    lines = [
        "# SimpleTuner's keys, one by one",
        MADE,
        "What `omnigen-pipe init --from-simpletuner` knows of keys whose meaning needs a word. "
        "Any other key that [stands in the configuration](configuration.md) under the same name is "
        "taken over as it is, and one that stands nowhere is reported as unknown. `*` stands for "
        "any ending. [Coming from there](from-simpletuner.md) is another page.",
    ]
    for title, entries in parts.items():
        lines += [f"\n## {title}\n", "| key there | here |", "|---|---|"]
        lines += [f"| `{_cell(key)}` | {_cell(note)} |" for key, note in entries.items()]
    return "\n".join(lines) + "\n"


PAGES = {
    "configuration.md": configuration,
    "manifests.md": manifests,
    "commands.md": commands,
    "simpletuner-keys.md": converted_keys,
}


def main() -> int:
    """Write the pages, or with `--check` name those that are not current."""
    stale = [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != page()
    ]
    if "--check" in sys.argv:
        if stale:
            print(f"Not current: {', '.join(stale)}. Run `make docs`.", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
