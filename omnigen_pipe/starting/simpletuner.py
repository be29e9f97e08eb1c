"""Conversion of SimpleTuner's JSON files: config.json, the dataloader's, and LyCORIS's.

Every key of every file gets an entry in the report: nothing is dropped without a word. Options
that exist here under the same name are found in the configuration's own models, so one that is
added there is taken over from then on. What is known about the others stands in
`simpletuner_keys`, and what is not known is said to be unknown.
"""

from __future__ import annotations

import json
import os.path
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from manifests.errors import UsageError
from omnigen_pipe.config import (
    ALPHA,
    DatasetConfig,
    LokrConfig,
    LokrModuleConfig,
    LokrPresetConfig,
    TrainConfig,
)
from omnigen_pipe.starting.answers import valid_name
from omnigen_pipe.starting.folders import from_workspace, model_from_workspace
from omnigen_pipe.starting.simpletuner_keys import (
    CHANGES,
    IGNORED_MASKS,
    NOT_NEEDED,
    NOT_SUPPORTED,
    OFF,
    OPTIMIZERS,
    PATHS,
    REMARKS,
    SPELLINGS,
    TABLES,
    VALUES,
    WITHOUT_EFFECT,
    Outcome,
    matching,
)


@dataclass(frozen=True)
class Entry:
    """What became of one key: `target` is the key here, where there is one."""

    file: str
    key: str
    value: Any
    outcome: Outcome
    target: str | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return dict(vars(self))


@dataclass
class Conversion:
    """The configuration, shaped as `omnigen-pipe.toml` is, the report, and what else to know."""

    values: dict[str, Any] = field(default_factory=dict)
    report: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    config_file: Path,
    root: Path,
    *,
    dataloader: Path | None = None,
    lycoris: Path | None = None,
    base: Path | None = None,
) -> Conversion:
    """Convert SimpleTuner's files for a workspace at `root`.

    `dataloader` and `lycoris` name the other two files where config.json does not, or where they
    lie elsewhere. Relative paths in the files start at `base`; by default that is the folder
    from which config.json's own references lead to files, else config.json's parent folder when
    it is named `config`. Raises `UsageError` for a file that is missing or cannot be read.
    """
    config_file = Path(os.path.abspath(config_file))
    raw = _read(config_file, dict)
    named = {_name(key): value for key, value in raw.items()}
    if str(named.get("model_family", "omnigen")) != "omnigen":
        raise UsageError(
            f"{config_file}: model_family is {named['model_family']!r}, and only omnigen can be "
            "converted."
        )
    found_dataloader = dataloader or _find(
        config_file, named, "data_backend_config", "--dataloader"
    )
    found_lycoris = lycoris or _find(config_file, named, "lycoris_config", "--lycoris")
    if base is None:
        base = _base(config_file, named, (found_dataloader, found_lycoris))
    base = Path(os.path.abspath(base))

    conversion = Conversion()
    where = _Where(root, base)
    _convert_config(conversion, config_file, raw, where, found_dataloader, found_lycoris)
    if found_dataloader is None:
        raise UsageError(
            f"{config_file} has no data_backend_config. Name the dataloader's JSON file with "
            "--dataloader."
        )
    _convert_dataloader(conversion, found_dataloader, where)
    if found_lycoris is not None:
        _convert_lycoris(conversion, found_lycoris)
    _settle(conversion)
    _add_notes(conversion, base, found_lycoris)
    return conversion


def _settle(conversion: Conversion) -> None:
    """Leave out options that exclude each other here, and say so in their entries."""
    validation = conversion.values.get("validation", {})
    if validation.get("validation_step_interval") and not (
        validation.get("validation_prompt") or validation.get("user_prompt_library")
    ):
        note = "there is no validation_prompt"
        names = ("validation_step_interval",)
        _leave_out(conversion, names, "without effect there", note, "validation")
    elif any(e.key == "validation_disable" and not _is_off(e.value) for e in conversion.report):
        names = ("validation_step_interval",)
        _leave_out(conversion, names, "not needed", "validation_disable is set", "validation")
    train = conversion.values.get("train", {})
    rollout = ("scheduled_sampling_max_step_offset", "scheduled_sampling_probability")
    if 0 < sum(bool(train.get(name)) for name in rollout) < len(rollout):
        _leave_out(conversion, rollout, "without effect there", "a rollout needs both of them")
    if train.get("optimizer") == "adamw_schedulefree" and train.get("use_ema"):
        note = "schedule-free AdamW averages the weights itself"
        _leave_out(conversion, ("use_ema", "ema_decay"), "not supported", note)
    if train.get("fsdp_enable") and train.get("base_model_precision", "no_change") != "no_change":
        _leave_out(conversion, ("fsdp_enable",), "not supported", "quantised weights fit one card")
    hub = conversion.values.get("hub", {})
    pushes = ("push_to_hub", "push_checkpoints_to_hub")
    if hub.get("push_to_hub") and not hub.get("hub_model_id"):
        note = "without hub_model_id: set it, and this, in [hub]"
        _leave_out(conversion, pushes, "not supported", note, "hub")
    elif hub.get("push_checkpoints_to_hub") and not hub.get("push_to_hub"):
        note = "nothing was pushed without push_to_hub"
        _leave_out(conversion, pushes[1:], "without effect there", note, "hub")


def _leave_out(
    conversion: Conversion,
    names: tuple[str, ...],
    outcome: Outcome,
    note: str,
    table: str = "train",
) -> None:
    """Take options of `table` out of the configuration again, with another entry for each."""
    for name in names:
        conversion.values[table].pop(name, None)
        for place, entry in enumerate(conversion.report):
            if entry.target == f"{table}.{name}":
                conversion.report[place] = replace(entry, outcome=outcome, target=None, note=note)


@dataclass(frozen=True)
class _Where:
    """Where paths start: in the files at `base`, in the new configuration at `root`."""

    root: Path
    base: Path


def _read(path: Path, kind: type) -> Any:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, kind):
        wanted = "an object" if kind is dict else "a list of datasets"
        raise UsageError(f"{path} must hold {wanted}, but holds a {type(raw).__name__}.")
    return raw


def _name(key: str) -> str:
    """An option's name without the dashes of a command line."""
    return key.lstrip("-").replace("-", "_")


def _find(config_file: Path, named: dict[str, Any], key: str, option: str) -> Path | None:
    """The file that `key` of config.json names: from any of its folders, else beside it."""
    value = named.get(key)
    if not value:
        return None
    text = Path(str(value)).expanduser()
    places = [folder / text for folder in config_file.parents]
    places.append(config_file.parent / text.name)
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"{config_file}: {key} names {value}, which is neither there from {config_file.parent} or "
        f"a folder above it, nor beside config.json. Name the file with {option}."
    )


def _base(config_file: Path, named: dict[str, Any], found: tuple[Path | None, ...]) -> Path:
    """SimpleTuner's working folder: from where config.json's references lead to `found`."""
    for key, path in zip(("data_backend_config", "lycoris_config"), found, strict=True):
        value = named.get(key)
        for folder in config_file.parents:
            if path is not None and value and folder / str(value) == path:
                return folder
    folder = config_file.parent
    return folder.parent if folder.name == "config" else folder


def _is_off(value: Any) -> bool:
    return value in (False, 0) or (value if value is None else str(value).lower()) in OFF


def _checked(info: FieldInfo, value: Any) -> Any:
    """`value`, often a text there, as the field's type; raises `ValidationError`."""
    annotation = info.annotation
    if (annotation is str or str in get_args(annotation)) and isinstance(value, (int, float)):
        value = str(value)
    kind: Any = annotation
    if info.metadata:
        kind = Annotated.__class_getitem__((annotation, *info.metadata))  # type: ignore[attr-defined]
    return TypeAdapter(kind).validate_python(value)


def _refusal(error: ValidationError, info: FieldInfo) -> str:
    """Why a value cannot be taken over, and what holds instead."""
    default = info.get_default(call_default_factory=True, validated_data={})
    fault = error.errors()[0]
    if fault["type"] == "value_error":
        return f"{fault['msg'].removeprefix('Value error, ')}; here {default!r} holds"
    return f"not possible here yet: {fault['msg'].lower()}; here {default!r} holds"


class _File:
    """Collects the entries of one file."""

    def __init__(self, conversion: Conversion, path: Path, prefix: str = "") -> None:
        self.report = conversion.report
        self.file = path.name
        self.prefix = prefix

    def add(
        self, key: str, value: Any, outcome: Outcome, target: str | None = None, note: str = ""
    ) -> None:
        self.report.append(Entry(self.file, self.prefix + key, value, outcome, target, note))

    def take(
        self,
        key: str,
        value: Any,
        table: dict[str, Any],
        target: str,
        info: FieldInfo,
        where: _Where,
    ) -> None:
        """Take `value` over as `target`, the key of `table` that `info` describes."""
        name = target.rsplit(".", 1)[-1]
        if value is None or (value == "" and name != "validation_negative_prompt"):
            self.add(key, value, "not needed", None, "empty there; the default holds here")
            return
        notes = []
        outcome: Outcome = "taken over"
        if name in ("tracker_run_name", "id") and valid_name(str(value)) != str(value):
            notes.append("characters that a name cannot hold here are replaced")
            outcome, value_here = "changed", valid_name(str(value))
        else:
            value_here = _respelled(name, value)
            if value_here != value:
                notes.append(f"{value_here} here")
        if (known := VALUES.get((name, str(value)))) is not None:
            outcome = known[0]
            notes.append(known[1])
        try:
            value_here = _checked(info, value_here)
        except ValidationError as error:
            self.add(key, value, "not supported", target, _refusal(error, info))
            return
        if name in PATHS and isinstance(value_here, str):
            value_here, note = _moved(name, value_here, where)
            notes += [note] if note else []
        if name in CHANGES and not _is_off(value):
            outcome = "changed"
            notes.append(CHANGES[name])
        elif name in REMARKS and not _is_off(value):
            notes.append(REMARKS[name])
        table[name] = value_here
        self.add(key, value, outcome, target, "; ".join(notes))

    def leave(self, key: str, value: Any) -> None:
        """Report a key that has no place here."""
        name = _name(key)
        if (note := matching(NOT_NEEDED, name)) is not None:
            self.add(key, value, "not needed", None, note)
        elif (note := matching(WITHOUT_EFFECT, name)) is not None:
            self.add(key, value, "without effect there", None, note)
        elif (note := matching(NOT_SUPPORTED, name)) is not None:
            if _is_off(value):
                self.add(key, value, "not needed", None, f"off there; {note}")
            else:
                self.add(key, value, "not supported", None, note)
        else:
            self.add(key, value, "unknown", None, "no such option here")


def _respelled(name: str, value: Any) -> Any:
    """A value that has another name here."""
    if name == "caption_strategy" and value == "instance_prompt":
        return "instanceprompt"
    if name == "report_to":
        named = {part.strip().lower() for part in str(value).split(",")}
        return "all" if named == {"tensorboard", "wandb"} else value
    if name == "optimizer":
        return OPTIMIZERS.get(str(value), value)
    if name == "dynamo_backend":
        return "no" if _is_off(value) else str(value).lower()
    if name == "resume_from_checkpoint" and str(value).lower() in ("false", "no"):
        return "none"
    return value


def _moved(name: str, path: str, where: _Where) -> tuple[str, str]:
    """A path as it is written here, and what to say about it."""
    if "://" in path:
        return path, ""
    absolute = where.base / Path(path).expanduser()
    of_model = name.startswith("pretrained_")
    if of_model and not absolute.exists() and path.count("/") == 1:
        return path, ""  # a hub id
    move = model_from_workspace if of_model else from_workspace
    moved = move(path, where.root, where.base)
    if name == "mask" and moved == ALPHA:
        moved = f"./{moved}"  # the folder of that name
    notes = [f"{moved} here"] if moved != path else []
    if not absolute.exists():
        notes.append(f"there is nothing at {absolute} now")
    return moved, "; ".join(notes)


def _convert_config(
    conversion: Conversion,
    path: Path,
    raw: dict[str, Any],
    where: _Where,
    dataloader: Path | None,
    lycoris: Path | None,
) -> None:
    file = _File(conversion, path)
    named = {_name(key): value for key, value in raw.items()}
    optimizer = str(named.get("optimizer"))
    schedule_free = optimizer.startswith("adamw_schedulefree")
    for key, value in raw.items():
        name = SPELLINGS.get(_name(key), _name(key))
        if name == "data_backend_config":
            file.add(key, value, "taken over", "[[dataset]]", f"read from {dataloader}")
        elif name == "webhook_config":
            _convert_webhooks(conversion, file, key, value, path)
        elif name == "lycoris_config" and lycoris is not None:
            file.add(key, value, "taken over", "[lokr]", f"read from {lycoris}")
        elif name == "model_type" and str(value) != "lora":
            file.add(key, value, "not supported", None, "only adapters are trained here")
        elif name == "lora_type" and str(value) != "lycoris":
            file.add(key, value, "not supported", None, "only LyCORIS LoKr is trained here")
        elif name == "resume_from_checkpoint" and str(value).lower() not in (*OFF, "latest"):
            file.add(key, value, "not supported", None, "checkpoints of SimpleTuner cannot be read")
        elif name == "lr_scheduler" and schedule_free and not str(value).startswith("constant"):
            file.add(key, value, "without effect there", None, "schedule-free AdamW has none")
        elif name in ("optimizer_beta1", "optimizer_beta2"):
            target = (
                f"{'lion' if 'lion' in optimizer else 'adam'}_{name.removeprefix('optimizer_')}"
            )
            info = TrainConfig.model_fields[target]
            values = conversion.values.setdefault("train", {})
            file.take(key, value, values, f"train.{target}", info, where)
        elif (
            name == "lr_warmup_steps"
            and str(named.get("lr_scheduler")) == "constant"
            and not schedule_free
        ):
            info = TrainConfig.model_fields[name]
            file.take(
                key, value, conversion.values.setdefault("train", {}), f"train.{name}", info, where
            )
            _amend_warmup(conversion)
        else:
            for table, model in TABLES.items():
                if name in model.model_fields:
                    values = conversion.values.setdefault(table, {})
                    info = model.model_fields[name]
                    file.take(key, value, values, f"{table}.{name}", info, where)
                    break
            else:
                file.leave(key, value)
    _leave_uncompiled(conversion)


def _convert_webhooks(
    conversion: Conversion, file: _File, key: str, value: Any, config_file: Path
) -> None:
    """The webhooks of `webhook_config`: a file's name, or what stands in such a file.

    Addresses are secrets, and stand in no report.
    """
    if value in (None, "", {}, []):
        file.add(key, value, "not needed", None, "empty there")
        return
    inline = not isinstance(value, str) or value.lstrip().startswith(("{", "["))
    shown: Any = "(hidden)" if inline else value
    if isinstance(value, str) and inline:
        try:
            value = json.loads(value)
        except ValueError:
            file.add(key, shown, "not supported", None, "what stands there is no JSON")
            return
    elif isinstance(value, str) and "://" in value:
        file.add(key, "(hidden)", "not supported", None, "the name of a file is expected")
        return
    elif isinstance(value, str):
        found = _find(config_file, {key: value}, key, "an absolute path")
        assert found is not None  # it is not empty
        try:
            value = json.loads(found.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{found} cannot be read as JSON: {type(error).__name__}.") from error
    hooks = []
    for each in value if isinstance(value, list) else [value]:
        options = each if isinstance(each, dict) else {}
        url = options.get("webhook_url") or options.get("callback_url")
        if not isinstance(url, str):
            file.add(key, shown, "not supported", None, "a webhook without an address")
            return
        form = "discord" if options.get("webhook_type") == "discord" else "json"
        hooks.append({"url": url, "form": form})
    conversion.values["webhook"] = hooks
    note = "other messages than there; better name the address by url_env"
    file.add(key, shown, "changed", "[[webhook]]", note)


def _leave_uncompiled(conversion: Conversion) -> None:
    """Take `dynamo_backend` back where the base model's precision cannot be compiled."""
    train = conversion.values.get("train", {})
    if train.get("base_model_precision") != "int4-quanto" or train.get("dynamo_backend") is None:
        return
    del train["dynamo_backend"]
    for position, entry in enumerate(conversion.report):
        if entry.target == "train.dynamo_backend" and not _is_off(entry.value):
            note = "torch.compile cannot trace int4-quanto; here 'no' holds"
            conversion.report[position] = Entry(
                entry.file, entry.key, entry.value, "not supported", entry.target, note
            )


def _amend_warmup(conversion: Conversion) -> None:
    """Say that warm-up has an effect here, where `lr_scheduler = constant` ignored it there."""
    entry = conversion.report[-1]
    if entry.outcome == "taken over" and not _is_off(entry.value):
        conversion.report[-1] = Entry(
            entry.file,
            entry.key,
            entry.value,
            "changed",
            entry.target,
            "without effect there with lr_scheduler = constant; here the rate does rise over "
            "these steps. Set it to 0 for what happened there",
        )


def _convert_dataloader(conversion: Conversion, path: Path, where: _Where) -> None:
    datasets: list[dict[str, Any]] = []
    entries = _read(path, list)
    masks = _mask_folders(entries)
    named = {_masks_of(raw) for raw in entries if isinstance(raw, dict)}
    for position, raw in enumerate(entries):
        if not isinstance(raw, dict):
            raise UsageError(f"{path}: entry {position} is not an object but {raw!r}.")
        name = str(raw.get("id", position))
        file = _File(conversion, path, f"{name}: ")
        kind = str(raw.get("dataset_type", "image"))
        source = str(raw.get("type", "local"))
        if kind in ("text_embeds", "image_embeds"):
            for key, value in raw.items():
                file.add(key, value, "not needed", None, f"{kind}: the workspace holds its own")
        elif name in masks and name in named:
            for key, value in raw.items():
                note = "the dataset that names it in conditioning_data has its folder as `mask`"
                file.add(key, value, "not needed", None, note)
        elif name in masks:
            for key, value in raw.items():
                file.add(key, value, "not needed", None, "no dataset names it in conditioning_data")
        elif kind not in get_args(DatasetConfig.model_fields["dataset_type"].annotation):
            for key, value in raw.items():
                file.add(key, value, "not supported", None, f"no datasets of type {kind} here")
        elif source not in ("local", "huggingface"):
            for key, value in raw.items():
                file.add(key, value, "not supported", None, f"no datasets from {source} here")
        else:
            strategy = conversion.values.get("defaults", {}).get("caption_strategy")
            strategy = raw.get("caption_strategy", strategy)
            table_is_read = "parquet" in (strategy, raw.get("metadata_backend"))
            folder = masks.get(_masks_of(raw) or "")
            datasets.append(_convert_dataset(file, raw, where, position, table_is_read, folder))
    conversion.values["dataset"] = datasets


def _mask_folders(entries: list[Any]) -> dict[str, str]:
    """The folder of each entry that holds masks, by its id."""
    return {
        str(raw["id"]): str(raw["instance_data_dir"])
        for raw in entries
        if isinstance(raw, dict)
        and raw.get("conditioning_type") == "mask"
        and raw.get("type", "local") == "local"
        and {"id", "instance_data_dir"} <= raw.keys()
    }


def _masks_of(raw: dict[str, Any]) -> str | None:
    """The id that `conditioning_data` of an entry names, where it names just one."""
    value = raw.get("conditioning_data")
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, str) else None


def _convert_dataset(
    file: _File,
    raw: dict[str, Any],
    where: _Where,
    position: int,
    table_is_read: bool,
    masks: str | None,
) -> dict[str, Any]:
    """One dataset; `masks` is the folder of its masks, if it names any."""
    dataset: dict[str, Any] = {}
    for key, value in raw.items():
        name = SPELLINGS.get(_name(key), _name(key))
        target = f"dataset.{name}"
        if name == "dataset_name" and raw.get("type") == "huggingface":
            dataset["instance_data_dir"] = f"hf://datasets/{value}"
            file.add(
                key, value, "taken over", "dataset.instance_data_dir", dataset["instance_data_dir"]
            )
        elif name == "conditioning_data" and masks is not None:
            dataset["mask"], note = _moved("mask", masks, where)
            note = f"its folder, {note}" if note else "its folder"
            file.add(key, value, "changed", "dataset.mask", f"{IGNORED_MASKS}; {note}")
        elif name == "only_instance_prompt" and not _is_off(value):
            dataset["caption_strategy"] = "instanceprompt"
            file.add(key, value, "changed", "dataset.caption_strategy", "instanceprompt here")
        elif name == "disable_multiline_split" and not _is_off(value):
            dataset["textfile_lines"] = "join"
            file.add(key, value, "changed", "dataset.textfile_lines", "join here")
        elif name == "parquet" and isinstance(value, dict) and not table_is_read:
            for option, setting in value.items():
                file.add(
                    f"parquet.{option}",
                    setting,
                    "without effect there",
                    None,
                    "neither captions nor paths came from the table",
                )
        elif name == "parquet" and isinstance(value, dict):
            _convert_parquet(file, value, dataset, where)
        elif name == "metadata_backend" and value == "parquet":
            dataset["type"] = "list"
            file.add(key, value, "changed", "dataset.type", "list here: the table names the images")
        elif name == "type" and value == "local" and raw.get("metadata_backend") == "parquet":
            file.add(key, value, "changed", "dataset.type", "list here: the table names the images")
        elif name in DatasetConfig.model_fields:
            file.take(key, value, dataset, target, DatasetConfig.model_fields[name], where)
        else:
            file.leave(key, value)
    dataset.setdefault("id", f"dataset-{position}")
    if dataset.get("instance_data_dir") is None:
        raise UsageError(
            f"{file.file}: the dataset `{dataset['id']}` has no instance_data_dir. Add it there."
        )
    return dataset


def _convert_parquet(
    file: _File, table: dict[str, Any], dataset: dict[str, Any], where: _Where
) -> None:
    """The `parquet` object of a dataset: which table, and which of its columns."""
    columns = {"filename_column": "path_column", "caption_column": "caption_column"}
    for key, value in table.items():
        if key == "path":
            moved, note = _moved("list_file", str(value), where)
            dataset["list_file"] = moved
            file.add(f"parquet.{key}", value, "taken over", "dataset.list_file", note)
        elif key in columns and isinstance(value, str):
            dataset[columns[key]] = value
            file.add(f"parquet.{key}", value, "taken over", f"dataset.{columns[key]}")
        else:
            note = NOT_SUPPORTED.get(key, "no such option here")
            file.add(f"parquet.{key}", value, "not supported", None, note)


def _convert_lycoris(conversion: Conversion, path: Path) -> None:
    raw = _read(path, dict)
    file = _File(conversion, path)
    lokr: dict[str, Any] = {}
    where = _Where(path.parent, path.parent)
    for key, value in raw.items():
        if key == "apply_preset" and isinstance(value, dict):
            preset = lokr.setdefault("apply_preset", {})
            _convert_preset(_File(conversion, path, "apply_preset."), value, preset)
        elif key in LokrConfig.model_fields and key != "apply_preset":
            file.take(key, value, lokr, f"lokr.{key}", LokrConfig.model_fields[key], where)
        else:
            file.leave(key, value)
    conversion.values["lokr"] = lokr


def _convert_preset(file: _File, raw: dict[str, Any], preset: dict[str, Any]) -> None:
    for key, value in raw.items():
        target = f"lokr.apply_preset.{key}"
        if key == "target_module" and isinstance(value, list):
            preset[key] = value
            if "FeedForward" in value:
                file.add(
                    key,
                    value,
                    "changed",
                    target,
                    "there FeedForward matched nothing and only attention was trained; here it "
                    "means OmniGenFeedForward. Take it out for the smaller adapter",
                )
            else:
                file.add(key, value, "taken over", target)
        elif key == "module_algo_map" and isinstance(value, dict):
            preset[key] = {
                module: _convert_module(file, f"{key}.{module}", options)
                for module, options in value.items()
            }
        elif key == "exclude_name" and isinstance(value, list) and not raw.get("use_fnmatch"):
            _convert_exclusions(file, key, value, preset, target)
        elif key in LokrPresetConfig.model_fields:
            file.add(key, value, "not supported", None, "not of the form that it has there")
        else:
            file.leave(key, value)


def _convert_exclusions(
    file: _File, key: str, patterns: list[Any], preset: dict[str, Any], target: str
) -> None:
    """Patterns that match beginnings of names there, and whole names here."""
    try:
        for pattern in patterns:
            re.compile(pattern)
    except (re.error, TypeError):
        file.add(key, patterns, "not supported", None, "not all are regular expressions")
        return
    preset[key] = [f"(?:{pattern}).*" for pattern in patterns]
    note = "a pattern matches beginnings there, so that layers.1 leaves out layers.10, too"
    file.add(key, patterns, "changed", target, note)


def _convert_module(file: _File, place: str, options: Any) -> dict[str, Any]:
    """The options of one class of modules."""
    converted: dict[str, Any] = {}
    if not isinstance(options, dict):
        file.add(place, options, "not supported", None, "not an object")
        return converted
    for key, value in options.items():
        if key in LokrModuleConfig.model_fields:
            target, info = f"lokr.apply_preset.{place}.{key}", LokrModuleConfig.model_fields[key]
            try:
                converted[key] = _checked(info, value)
            except ValidationError as error:
                file.add(f"{place}.{key}", value, "not supported", target, _refusal(error, info))
                continue
            file.add(f"{place}.{key}", value, "taken over", target)
        elif key == "algo" and value == "lokr":
            file.add(f"{place}.{key}", value, "not needed", None, "always lokr")
        else:
            file.add(f"{place}.{key}", value, "not supported", None, "no such option per module")
    return converted


def _add_notes(conversion: Conversion, base: Path, lycoris: Path | None) -> None:
    """What concerns no single key."""
    values, notes = conversion.values, conversion.notes
    notes.append(
        f"Relative paths in the files were taken from {base}, as SimpleTuner's working folder "
        "(--relative-to names another one). Paths that lead out of the workspace are absolute."
    )
    notes.append(
        "There, images smaller than their bucket are enlarged; here they are left out, and "
        "counted, unless upscale = true."
    )
    train = values.get("train", {})
    if not train.get("max_train_steps") and not train.get("num_train_epochs"):
        notes.append("Neither max_train_steps nor num_train_epochs is set: set one.")
    unset = [
        f"{name} = {info.default}"
        for name, info in TrainConfig.model_fields.items()
        if name in _DEFAULTS_DIFFER and name not in train
    ]
    if unset:
        notes.append(
            "Not in the files, so with this project's defaults, which may not be SimpleTuner's: "
            + ", ".join(unset)
            + "."
        )
    if lycoris is None:
        notes.append("No lycoris_config.json was named: [lokr] has its defaults.")
    if not values["dataset"]:
        notes.append("No dataset could be converted: add one under [[dataset]].")


#: Settings that change what is learned, and whose defaults are not the same in both projects.
_DEFAULTS_DIFFER = (
    "seed",
    "train_batch_size",
    "learning_rate",
    "lr_warmup_steps",
    "max_grad_norm",
    "grad_clip_method",
    "mixed_precision",
    "caption_dropout_probability",
    "adam_weight_decay",
)
