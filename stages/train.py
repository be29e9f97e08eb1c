"""train: the frozen samples and the base model become a LoKr adapter.

A run freezes its samples at its first start and goes on from its newest checkpoint ever after.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache

from manifests.errors import PipeError, UsageError
from manifests.keys import key
from manifests.parquet import check_undamaged
from omnigen_pipe.config import LokrConfig, read_lycoris_config
from omnigen_pipe.latents.vae import scaling_factor, vae_key
from omnigen_pipe.model_files import model_part
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.library import dropout_prompt
from omnigen_pipe.prompts.tokenizer import load_configured
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Checkpoint, Position
from omnigen_pipe.runs.frozen import (
    TRAINED_SPLITS,
    FrozenSamples,
    Join,
    content_key,
    freeze,
    join,
    locate,
)
from omnigen_pipe.runs.run import Run, check_settings, frozen_settings
from omnigen_pipe.summary import Summary
from omnigen_pipe.weights import weights_files, weights_hashes
from omnigen_pipe.workspace import Workspace


def run(
    workspace: Workspace,
    progress: Progress,
    device: str | None = None,
    allow_missing: bool = False,
) -> Summary:
    """Start or go on with the configured run; see `training.loop` for the work itself."""
    config = workspace.config.train
    lokr = check(workspace)
    this = Run(config.tracker_run_name, workspace.run_folder(config.tracker_run_name))
    summary = Summary("train", changed=False)

    checkpoint, notes = this.resume_point(config.resume_from_checkpoint)
    if this.has_begun():
        check_settings(this.name, this.settings(), frozen_settings(config, lokr))
        notes += _data_changes(workspace, this)
    else:
        _freeze(workspace, this, lokr, allow_missing)
    summary.notes += notes
    frozen = FrozenSamples.open(this.samples)
    summary.left_out = frozen.left_out()
    total = frozen.total_steps(config)
    summary.details = {"run": str(this.folder), "total_steps": total}
    if checkpoint is None or checkpoint.position.step < total:
        return _train(workspace, progress, device, this, frozen, lokr, checkpoint, summary)
    summary.counts = {"samples": len(frozen), "steps": checkpoint.position.step}
    summary.details["adapter"] = str(checkpoint.adapter)
    summary.notes.append(f"The run `{this.name}` is complete. Adapter: {checkpoint.adapter}")
    return summary


def check(workspace: Workspace) -> LokrConfig:
    """The adapter to train; raises `UsageError` for what is wrong without looking at any data."""
    config = workspace.config.train
    if config.max_train_steps == 0 and config.num_train_epochs == 0:
        raise UsageError("[train] says no end: set max_train_steps or num_train_epochs.")
    path = config.lycoris_config
    return read_lycoris_config(workspace.path(path)) if path else workspace.config.lokr


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
    folder = model_part(workspace, "transformer")
    return key(*weights_hashes(workspace, weights_files(folder)))


def _freeze(workspace: Workspace, this: Run, lokr: LokrConfig, allow_missing: bool) -> None:
    """Freeze the samples of a new run, and how many were left out by reason."""
    _check_manifests(workspace)
    found, metadata = _join(workspace)
    if found.incomplete and not allow_missing:
        lacking = {"encode-vae": found.lacking_latent, "tokenize": found.lacking_prompt}
        commands = [f"`omnigen-pipe {stage}`" for stage, number in lacking.items() if number]
        raise PipeError(
            f"{found.incomplete} samples lack a latent or prompt: run {' and '.join(commands)} "
            "first, or train without them by --allow-missing."
        )
    if not any(split in TRAINED_SPLITS for split in found.table["split"].to_pylist()):
        raise PipeError(
            "There is no sample to train on: every image was left out. `omnigen-pipe bucket` "
            "says why."
        )
    reasons = {
        "the image could not be decoded (see encode-vae)": found.failed,
        "no latent or prompt yet": found.incomplete,
    }
    metadata |= {
        "transformer_key": _transformer_key(workspace),
        "left_out": json.dumps({reason: number for reason, number in reasons.items() if number}),
    }
    this.write_settings(workspace, frozen_settings(workspace.config.train, lokr))
    freeze(found.table, this.samples, workspace.staging, metadata)


def _check_manifests(workspace: Workspace) -> None:
    """Raise `ManifestError` where a manifest is damaged: what is frozen of it would stay wrong."""
    if workspace.samples.exists():
        check_undamaged([workspace.samples.path], workspace.samples.manifest)
    for log in (workspace.latents, workspace.prompts):
        check_undamaged(log.fragments(), log.manifest)


def _data_changes(workspace: Workspace, this: Run) -> list[str]:
    """A sentence where today's data differ from what the run froze, or cannot be compared.

    Raises `UsageError` where the transformer is another one.
    """
    frozen = FrozenSamples.open(this.samples)
    if _transformer_key(workspace) != frozen.metadata["transformer_key"]:
        raise UsageError(
            f"The run `{this.name}` was started on another transformer than "
            f"{workspace.config.model.pretrained_model_name_or_path} holds now. Put the old one "
            "back, or set another tracker_run_name to start a new run."
        )
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


def _train(
    workspace: Workspace,
    progress: Progress,
    device: str | None,
    this: Run,
    frozen: FrozenSamples,
    lokr: LokrConfig,
    checkpoint: Checkpoint | None,
    summary: Summary,
) -> Summary:
    """Load the model, attach the adapter, and train to the end or to a signal."""
    from omnigen_pipe.model.transformer import check_fits
    from omnigen_pipe.runs.metrics import METRICS_NAME, MetricsWriter, truncate
    from omnigen_pipe.stop import stop_on_signal
    from omnigen_pipe.training.batches import BatchReader
    from omnigen_pipe.training.loop import Plan, train
    from omnigen_pipe.training.state import read_state, write_state
    from omnigen_pipe.training.trainee import load_trainee

    config = workspace.config.train
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    if reader.locations.reencoded:
        summary.notes.append(
            f"{reader.locations.reencoded} latents were encoded again since the run began, and "
            "may differ in their last bits."
        )
    trainee = load_trainee(workspace, lokr, device)
    check_fits(trainee.transformer, frozen.bucket_names, frozen.largest_token())
    for target in trainee.targets:
        progress.note(target.describe())
    start = checkpoint.position if checkpoint else Position()
    if checkpoint is not None:
        read_state(trainee, checkpoint)
        checkpoints.set_aside(this.checkpoints, after=start.step)
        progress.note(f"Going on from {checkpoint.folder}")

    def save(position: Position) -> None:
        nonlocal checkpoint
        checkpoint = checkpoints.save(
            this.checkpoints,
            workspace.staging,
            position,
            lambda folder: write_state(trainee, folder, lokr, position.step),
        )
        checkpoints.prune(this.checkpoints, workspace.staging, config.checkpoints_total_limit)

    order = lru_cache(maxsize=2)(lambda epoch: frozen.order(epoch, config))
    plan = Plan(start, summary.details["total_steps"], order, reader.read)
    truncate(this.folder / METRICS_NAME, start.step, workspace.staging)
    with (
        MetricsWriter(this.folder, start.step, config.report_to == "tensorboard") as metrics,
        stop_on_signal() as stop,
    ):
        reached = train(trainee, plan, config, metrics, save, progress, stop)

    adapter = str(checkpoint.adapter) if checkpoint else None
    steps = reached.position.step
    summary.changed = steps != start.step
    summary.counts = {"samples": len(frozen), "steps": steps, "steps now": steps - start.step}
    summary.signal = stop.signal
    summary.details |= {
        "adapter": adapter,
        "loss": reached.loss,
        "targets": [asdict(target) for target in trainee.targets],
        "device": str(trainee.device),
        "dtype": str(trainee.dtype).removeprefix("torch."),
    }
    if reached.loss is not None:
        summary.notes.append(f"Loss: {reached.loss:.4f} (mean of the last {reached.over} steps)")
    if adapter:
        summary.notes.append(f"Adapter: {adapter}")
    if stop.signal is not None:
        summary.notes.append(
            f"Stopped by a signal at step {steps}, saved. Run the same command to go on."
        )
    return summary
