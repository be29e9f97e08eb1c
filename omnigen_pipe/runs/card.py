"""The model card of a pushed adapter: what it is, what it was trained on, how to use it.

It is read by others: it holds no path of this machine, of captions only the trigger words, and the
prompts of the validation pictures that it shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from manifests.parquet import tool_version
from omnigen_pipe.config import EMBEDDED, Config, DatasetConfig, LokrConfig
from omnigen_pipe.model_files import Model
from omnigen_pipe.workspace import Workspace

#: Pictures that the card shows; all are pushed.
_SHOWN = 12
#: Settings of `[train]` that the card names.
_SETTINGS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "optimizer",
    "mixed_precision",
    "base_model_precision",
    "caption_dropout_probability",
    "seed",
)


#: What Markdown could take for more than text.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|!&~$]")


@dataclass(frozen=True)
class Shown:
    """A picture on the card: its path in the repository, its prompt (empty where it is not known),
    and whether it is of the weights' average."""

    path: str
    prompt: str
    average: bool

    @property
    def text(self) -> str:
        """What it is, in one line."""
        prompt = " ".join(self.prompt.split())
        return f"{prompt} (of the average)" if self.average else prompt


def card(
    workspace: Workspace,
    lokr: LokrConfig,
    samples: pa.Table,
    *,
    name: str,
    repository: str,
    step: int,
    averaged: bool,
    pictures: Sequence[Shown],
) -> str:
    """The text of the card of the run `name` after `step`, as `README.md` of `repository`.

    `samples` are all frozen samples; `pictures` are those of its newest validation, and
    `averaged` says whether there is an `ema.safetensors`.
    """
    from huggingface_hub import ModelCardData

    config = workspace.config
    model = Model.of(workspace)
    words = trigger_words(config)
    shown = pictures[:_SHOWN]
    base = model.label if not model.is_local and model.name != EMBEDDED else None
    facts = ModelCardData(
        license=config.hub.model_card_license,
        base_model=base,
        instance_prompt=", ".join(words) or None,
        pipeline_tag="text-to-image",
        tags=["omnigen", "lora", "lokr", "lycoris", "text-to-image"],
        datasets=_hub_datasets(config, samples) or None,
        widget=[
            {"text": one.text, "output": {"url": quote(one.path)}} for one in shown if one.prompt
        ]
        or None,
    )
    parts = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {PurePosixPath(repository).name}",
        f"A LyCORIS LoKr adapter of {model.label}, after {step} optimizer steps.",
    ]
    if config.hub.model_card_note:
        parts.append(config.hub.model_card_note)
    parts += ["## Trigger words", _trigger_sentence(words)]
    if shown:
        when = PurePosixPath(shown[0].path).parent.name.removeprefix("step-").lstrip("0") or "0"
        parts.append(f"## Validation pictures after step {when}")
        parts += [_picture(one) for one in shown]
    parts += ["## Training data", _data(samples)]
    parts += ["## Training", _training(config, lokr, name)]
    usable = EMBEDDED if model.name == EMBEDDED else base
    parts += ["## Use", _usage(repository, usable, words, averaged)]
    parts.append(f"Made with omnigen-pipe {tool_version()}.")
    return "\n\n".join(parts) + "\n"


def _picture(shown: Shown) -> str:
    """A picture with its text beneath."""
    text = _MARKUP.sub(r"\\\g<0>", shown.text)
    return f"![{text}]({quote(shown.path)})" + (f"\\\n{text}" if text else "")


def trigger_words(config: Config) -> list[str]:
    """What calls forth what was learned: as configured, else the prompts that captions are or
    begin with."""
    if config.hub.model_card_trigger_words is not None:
        return list(config.hub.model_card_trigger_words)
    return list(
        dict.fromkeys(
            dataset.instance_prompt
            for dataset in config.datasets
            if dataset.split == "train"
            and dataset.instance_prompt
            and (dataset.prepend_instance_prompt or dataset.caption_strategy == "instanceprompt")
        )
    )


def _trigger_sentence(words: Sequence[str]) -> str:
    if not words:
        return "None: describe the picture."
    return "Write in the prompt: " + ", ".join(f"`{word}`" for word in words)


def _hub_datasets(config: Config, samples: pa.Table) -> list[str]:
    """The hub's datasets among those that were trained on, as OWNER/NAME."""
    trained = set(pc.unique(samples["dataset"]).to_pylist())

    def repository(dataset: DatasetConfig) -> str:
        place = dataset.instance_data_dir.removeprefix("hf://datasets/")
        return "/".join(place.split("/")[:2]).split("@")[0]

    return sorted(
        {
            repository(dataset)
            for dataset in config.datasets
            if dataset.source == "huggingface" and dataset.id in trained
        }
    )


def _data(samples: pa.Table) -> str:
    """How many samples of what, by dataset and by bucket."""
    lines = ["| dataset | use | samples | seen per epoch |", "|---|---|---|---|"]
    of_split = samples.group_by(["dataset", "split"]).aggregate(
        [([], "count_all"), ("repeats", "sum")]
    )
    for row in of_split.sort_by([("dataset", "ascending"), ("split", "ascending")]).to_pylist():
        count = row["count_all"]
        seen = 0 if row["split"] == "eval" else row["repeats_sum"] + count
        lines.append(f"| {row['dataset']} | {row['split']} | {count} | {seen} |")
    buckets = pc.value_counts(samples["bucket"]).to_pylist()
    buckets.sort(key=lambda bucket: -bucket["counts"])
    sizes = ", ".join(f"{bucket['values']} ({bucket['counts']})" for bucket in buckets)
    return "\n".join([*lines, "", f"Sizes in pixels: {sizes}."])


def _training(config: Config, lokr: LokrConfig, name: str) -> str:
    train = config.train.model_dump(mode="json")
    lines = ["| setting | value |", "|---|---|", f"| run | {name} |"]
    lines += [f"| {setting} | {train[setting]} |" for setting in _SETTINGS]
    targets = ", ".join(lokr.apply_preset.target_module)
    lines.append(f"| adapter | LoKr of {targets}; see `lycoris_config.json` |")
    return "\n".join(lines)


def _usage(repository: str, base: str | None, words: Sequence[str], averaged: bool) -> str:
    model = base or "FOLDER-OF-THE-BASE-MODEL"
    prompt = (words[0] if words else "a photo of a cat").replace('"', "'").replace("\n", " ")
    lines = [
        "```sh",
        f"hf download {repository} adapter.safetensors --local-dir .",
        f'omnigen-pipe generate "{prompt}" --adapter adapter.safetensors --model {model}',
        "# Or as a model of its own, for diffusers:",
        f"omnigen-pipe export adapter.safetensors --model {model} -o merged",
        "```",
    ]
    if averaged:
        lines += ["", "`ema.safetensors` is the moving average of the weights, in the same form."]
    return "\n".join(lines)
