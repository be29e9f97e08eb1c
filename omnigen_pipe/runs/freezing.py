"""Freezing a run's inputs at its start, and comparing today's with them ever after."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc

from manifests.errors import PipeError, UsageError
from manifests.keys import key
from manifests.parquet import check_undamaged
from omnigen_pipe.latents.vae import scaling_factor, vae_key
from omnigen_pipe.model_files import model_part
from omnigen_pipe.prompts.library import dropout_prompt
from omnigen_pipe.prompts.tokenizer import load_configured
from omnigen_pipe.runs.frozen import (
    TRAINED_SPLITS,
    FrozenSamples,
    Join,
    content_key,
    freeze,
    join,
)
from omnigen_pipe.runs.run import Run
from omnigen_pipe.weights import weights_key
from omnigen_pipe.workspace import Workspace

NOTHING_TO_EVALUATE = (
    "eval_steps_interval is set, and there is nothing to evaluate on: give a dataset "
    'dataset_type = "eval", or set eval_steps_interval = 0.'
)


def _join(workspace: Workspace) -> tuple[Join, dict[str, str]]:
    """Today's samples with their latents and prompts, and what else a run freezes of them."""
    vae = model_part(workspace, "vae")
    tokenizer = load_configured(workspace)
    latents = vae_key(workspace, vae)
    found = join(workspace, latents, tokenizer.key)
    metadata = {
        "vae_key": latents,
        "tokenizer_key": tokenizer.key,
        "scaling_factor": repr(scaling_factor(vae)),
        "dropout_ids": json.dumps(tokenizer.encode([dropout_prompt(workspace.config)])[0]),
    }
    return found, {**metadata, "content": key(content_key(found.table), *metadata.values())}


def _transformer_key(workspace: Workspace) -> str:
    """A key of the weights of the configured transformer."""
    return weights_key(model_part(workspace, "transformer"), workspace)


def freeze_today(workspace: Workspace, path: Path, allow_missing: bool) -> None:
    """Freeze today's samples as `path`, with how many were left out by reason.

    Raises `PipeError` where some lack a latent, mask or prompt and not `allow_missing`, or where
    there are none; `UsageError` where evaluation is asked for and there is nothing to evaluate on;
    `ManifestError` for a damaged manifest.
    """
    _check_manifests(workspace)
    found, metadata = _join(workspace)
    if found.incomplete and not allow_missing:
        lacking = {"encode-vae": found.lacking_latent, "tokenize": found.lacking_prompt}
        commands = [f"`omnigen-pipe {stage}`" for stage, number in lacking.items() if number]
        raise PipeError(
            f"{found.incomplete} samples lack a latent, mask or prompt: run "
            f"{' and '.join(commands)} first, or train without them by --allow-missing."
        )
    splits = set(pc.unique(found.table["split"]).to_pylist())
    if not splits & set(TRAINED_SPLITS):
        raise PipeError(
            "There is no sample to train on: every image was left out. `omnigen-pipe bucket` "
            "says why."
        )
    if workspace.config.train.eval_steps_interval and "eval" not in splits:
        raise UsageError(NOTHING_TO_EVALUATE)
    reasons = {
        "the image could not be decoded (see encode-vae)": found.failed,
        "no latent, mask or prompt yet": found.incomplete,
    }
    metadata |= {
        "transformer_key": _transformer_key(workspace),
        "left_out": json.dumps({reason: number for reason, number in reasons.items() if number}),
    }
    freeze(found.table, path, workspace.staging, metadata)


def _check_manifests(workspace: Workspace) -> None:
    """Raise `ManifestError` where a manifest is damaged: what is frozen of it would stay wrong."""
    if workspace.samples.exists():
        check_undamaged([workspace.samples.path], workspace.samples.manifest)
    for log in (workspace.latents, workspace.prompts):
        check_undamaged(log.fragments(), log.manifest)


def check_transformer(workspace: Workspace, this: Run, frozen: FrozenSamples) -> None:
    """Raise `UsageError` where the configured transformer is not the one of the run."""
    if _transformer_key(workspace) != frozen.metadata["transformer_key"]:
        raise UsageError(
            f"The run `{this.name}` was started on another transformer than "
            f"{workspace.config.model.pretrained_model_name_or_path} holds now. Put the old one "
            "back, or set another tracker_run_name to start a new run."
        )


def check_evaluation(workspace: Workspace, this: Run) -> None:
    """Raise `UsageError` where evaluation is asked of a run that has no samples for it."""
    if workspace.config.train.eval_steps_interval == 0:
        return
    if not len(FrozenSamples.open(this.samples, ("eval",))):
        raise UsageError(
            f"eval_steps_interval is set, and the run `{this.name}` was started without evaluation "
            "samples. Set eval_steps_interval = 0, or another tracker_run_name to start a new run."
        )


def changes_since(workspace: Workspace, this: Run) -> list[str]:
    """A sentence where today's data differ from what the run froze, or cannot be compared.

    Raises `UsageError` where the transformer is another one.
    """
    frozen = FrozenSamples.open(this.samples)
    check_transformer(workspace, this, frozen)
    kept = f"The run `{this.name}` goes on with the {len(frozen)} samples that it froze"
    try:
        _, metadata = _join(workspace)
    except UsageError:
        raise
    except PipeError as error:
        return [f"{kept}; today's data were not compared with them: {error}"]
    if metadata["content"] == frozen.metadata["content"]:
        return []
    return [f"{kept}; today's data differ. Set another tracker_run_name to train on them."]
