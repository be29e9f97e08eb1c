"""The terms of a run: settings that give it its meaning and are held, and those that may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig, TrainConfig

#: A free map: its keys have no defaults of their own.
_FREE_MAP = "lokr.apply_preset.module_algo_map."

#: Settings of `[train]` that may differ when a run goes on.
CHANGEABLE = frozenset(
    {
        "tracker_run_name",
        "max_train_steps",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_end",
        "lr_power",
        "lr_num_cycles",
        "max_grad_norm",
        "grad_clip_method",
        "gradient_checkpointing",
        "gradient_accumulation_steps",  # the number of micro-batches is frozen
        "dynamo_backend",
        "dynamo_mode",
        "fsdp_enable",
        "quantize_via",
        "eval_steps_interval",
        "num_eval_images",
        "eval_seed",
        "checkpoint_step_interval",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "tracker_project_name",
        "lycoris_config",  # what it says is compared, not where it lies
        "mixed_precision",  # what it comes to on the device is compared
    }
)

#: Of those, the ones whose change is worth a word, because it changes how the run goes on.
_SAID = CHANGEABLE - {
    "tracker_run_name",
    "tracker_project_name",
    "resume_from_checkpoint",
    "report_to",
    "lycoris_config",
}


def frozen_settings(config: TrainConfig, lokr: LokrConfig) -> dict[str, Any]:
    """The settings that must stay the same over a run's life, flat, by their names."""
    train = config.model_dump(mode="json")
    settings = {name: value for name, value in train.items() if name not in CHANGEABLE}
    return settings | _flat("lokr", lokr.model_dump(mode="json"))


def free_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that may change when a run goes on, by their names."""
    train = config.model_dump(mode="json")
    return {name: train[name] for name in sorted(CHANGEABLE & train.keys())}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(f"{name}.{key}", inner) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def check_settings(name: str, frozen: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UsageError` listing every setting that differs from the run's own.

    A setting that the run does not know came with a later version: it ran with the default.
    """
    defaults = frozen_settings(TrainConfig(), LokrConfig())
    known = {k: v for k, v in defaults.items() if not k.startswith(_FREE_MAP)} | dict(frozen)
    changed = [
        f"{setting}: {known.get(setting)!r} → {now.get(setting)!r}"
        for setting in sorted({*frozen, *now})
        if known.get(setting) != now.get(setting)
    ]
    if changed:
        raise UsageError(
            f"The run `{name}` was started with other settings:\n  "
            + "\n  ".join(changed)
            + "\nPut them back, or set another tracker_run_name to start a new run."
        )


def taken_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each free setting whose change alters how a run goes on."""
    return [
        f"{name} was {before[name]!r} and is {now[name]!r} from here on."
        for name in sorted(_SAID & now.keys() & before.keys())
        if now[name] != before[name]
    ]
