"""Going on with a run: every setting is either free to change or held, and there is no third."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import UsageError
from omnigen_pipe.config import Config, LokrConfig, TrainConfig
from omnigen_pipe.runs.conditions import processor, versions
from omnigen_pipe.runs.run import Run, Start
from omnigen_pipe.runs.terms import CHANGEABLE
from omnigen_pipe.workspace import Workspace

#: A value other than `_START`'s for every setting that another value would make another run of.
HELD: dict[str, Any] = {
    "seed": 7,
    "train_batch_size": 3,
    "optimizer": "lion",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-6,
    "adam_weight_decay": 0.1,
    "lion_beta1": 0.5,
    "lion_beta2": 0.5,
    "prodigy_d_coef": 2.0,
    "base_model_precision": "int8-quanto",
    "caption_dropout_probability": 0.5,
    "masked_loss_probability": 0.5,
    "caption_dropout_prompt": "empty",
    "vae_posterior": "mean",
    "scheduled_sampling_max_step_offset": 3,
    "scheduled_sampling_probability": 0.25,
    "scheduled_sampling_start_step": 10,
    "scheduled_sampling_ramp_steps": 10,
    "use_ema": True,
    "ema_decay": 0.9,
    "init_lora": "other.safetensors",
}

#: The same for those that may change, and whether the change is worth a word.
FREE: dict[str, tuple[Any, bool]] = {
    "tracker_run_name": ("renamed", False),
    "max_train_steps": (99, True),
    "num_train_epochs": (9, True),
    "learning_rate": (1e-3, True),
    "lr_scheduler": ("cosine", True),
    "lr_warmup_steps": (7, True),
    "lr_end": (1e-6, True),
    "lr_power": (2.0, True),
    "lr_num_cycles": (3, True),
    "max_grad_norm": (0.5, True),
    "grad_clip_method": ("value", True),
    "gradient_checkpointing": (False, True),
    "gradient_accumulation_steps": (5, True),
    "mixed_precision": ("no", True),  # what it comes to is compared with the checkpoint's
    "quantize_via": ("accelerator", True),
    "dynamo_backend": ("inductor", True),
    "dynamo_mode": ("max-autotune-no-cudagraphs", True),
    "fsdp_enable": (True, True),
    "eval_steps_interval": (10, True),
    "num_eval_images": (4, True),
    "eval_seed": (5, True),
    "checkpoint_step_interval": (7, True),
    "checkpoints_total_limit": (2, True),
    "resume_from_checkpoint": ("step-00000001", False),
    "report_to": ("none", False),
    "tracker_project_name": ("other", False),
    "lycoris_config": ("elsewhere.json", False),  # what it says is compared
}

_START: dict[str, Any] = {
    "max_train_steps": 10,
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 0.5,
}


def _workspace(folder: Path, **changes: Any) -> Workspace:
    return Workspace(folder, Config(train=TrainConfig(**{**_START, **changes})))


def _begin(folder: Path, lokr: LokrConfig) -> tuple[Run, Start]:
    here = _workspace(folder)
    run = Run("r", here.run_folder("r"))
    run.folder.mkdir(parents=True)
    return run, run.begin(here, lokr, 2, lambda: run.samples.write_bytes(b"frozen"))


def test_every_setting_is_classified() -> None:
    """A new field of [train] belongs into `HELD` or `FREE`, and in the latter case also into
    CHANGEABLE: it must be thought about what its change means for a run that goes on."""
    assert HELD.keys() | FREE.keys() == TrainConfig.model_fields.keys()
    assert not HELD.keys() & FREE.keys()
    assert FREE.keys() == CHANGEABLE


@pytest.mark.parametrize("name", HELD)
def test_a_setting_that_makes_another_run_is_refused(tmp_path: Path, name: str) -> None:
    run, start = _begin(tmp_path, LokrConfig())
    old = getattr(_workspace(tmp_path).config.train, name)
    changed = _workspace(tmp_path, **{name: HELD[name]})
    with pytest.raises(UsageError) as caught:
        run.go_on(changed, LokrConfig(), 2)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [f"  {name}: {old!r} → {HELD[name]!r}"]
    assert "another tracker_run_name" in lines[-1]
    assert run.start() == start, "nothing was written"


@pytest.mark.parametrize("name", FREE)
def test_a_setting_that_may_change_is_taken_and_said_once(tmp_path: Path, name: str) -> None:
    run, start = _begin(tmp_path, LokrConfig())
    assert run.go_on(_workspace(tmp_path), LokrConfig(), 2) == (start, [])
    value, said = FREE[name]
    old = getattr(_workspace(tmp_path).config.train, name)
    changed = _workspace(tmp_path, **{name: value})
    now, notes = run.go_on(changed, LokrConfig(), 2)
    assert (f"{name} was {old!r} and is {value!r} from here on." in notes) == said
    assert now.micro_batches == start.micro_batches == 2
    assert now.settings == start.settings
    assert run.go_on(changed, LokrConfig(), 2)[1] == notes, "not until it has gone on"
    run.note_conditions(changed, now, {})
    assert run.go_on(changed, LokrConfig(), 2)[1] == [n for n in notes if "stays at" in n]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (4, 1), (2, 3), (3, 2)])
def test_a_global_batch_keeps_its_micro_batches(
    tmp_path: Path, processes: int, accumulation: int
) -> None:
    run, _ = _begin(tmp_path, LokrConfig())
    here = _workspace(tmp_path, gradient_accumulation_steps=accumulation)
    now, notes = run.go_on(here, LokrConfig(), processes)
    assert now.micro_batches == 2
    come_to = processes * accumulation
    assert any(f"now come to {come_to}." in note for note in notes) == (come_to != 2)


#: Another value for everything that says what the adapter is.
LOKR: dict[str, Any] = {
    "algo": "lokr",  # there is no other
    "multiplier": 0.5,
    "linear_dim": 8,
    "linear_alpha": 2.0,
    "factor": 4,
    "decompose_both": True,
    "full_matrix": True,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {}},
}


@pytest.mark.parametrize("name", LOKR)
def test_another_adapter_is_another_run(tmp_path: Path, name: str) -> None:
    assert LOKR.keys() == LokrConfig.model_fields.keys()
    run, _ = _begin(tmp_path, LokrConfig())
    other = LokrConfig.model_validate({name: LOKR[name]})
    if name == "algo":
        run.go_on(_workspace(tmp_path), other, 2)
        return
    with pytest.raises(UsageError, match=rf"\n  lokr\.{name}.* → "):
        run.go_on(_workspace(tmp_path), other, 2)


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    run, _ = _begin(tmp_path, LokrConfig())
    with pytest.raises(UsageError) as caught:
        run.go_on(_workspace(tmp_path, **HELD), LokrConfig(multiplier=0.5), 2)
    listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert listed == sorted([*HELD, "lokr.multiplier"])


def test_what_a_run_was_started_with_is_kept_as_plain_json(tmp_path: Path) -> None:
    """So that a later version, or a person, reads it."""
    run, start = _begin(tmp_path, LokrConfig())
    entries = json.loads((run.folder / "run.json").read_text())
    assert entries["settings"]["train_batch_size"] == 1
    assert entries["free"]["learning_rate"] == 1e-4
    assert entries["micro_batches"] == 2
    assert run.start() == start


def test_processes_without_work_are_said(tmp_path: Path) -> None:
    run, _ = _begin(tmp_path, LokrConfig())
    _, notes = run.go_on(_workspace(tmp_path), LokrConfig(), 5)
    assert "3 of the 5 processes have nothing to compute." in notes


def test_a_new_beginning_measures_the_variance_anew(tmp_path: Path) -> None:
    """It may be of other data: nothing came of the start before."""
    run, _ = _begin(tmp_path, LokrConfig())
    here = _workspace(tmp_path)
    run.write_variance(here, (1.0, 2.0), 7)
    assert run.variance() == (1.0, 2.0)
    run.begin(here, LokrConfig(), 1, lambda: None)
    assert run.variance() is None


def test_what_bits_depend_on_is_recorded_and_its_change_is_said(tmp_path: Path) -> None:
    run, start = _begin(tmp_path, LokrConfig())
    here = _workspace(tmp_path)
    now = {**versions(), "processor": processor(), "threads": "1"}
    assert {"torch", "lycoris-lora", "schedulefree", "bitsandbytes", "python"} <= now.keys()
    assert now["processor"]
    assert run.note_conditions(here, start, now) == []
    assert run.start().conditions == now
    assert run.note_conditions(here, run.start(), now) == []
    (said,) = run.note_conditions(here, run.start(), {**now, "threads": "2"})
    assert "threads 1 → 2" in said
    assert run.start().conditions["threads"] == "2"
