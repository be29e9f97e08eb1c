"""The embedded model's transformer: every parameter is trained, from random ones.

By the project's own means: the loop, its order of data, its draws, objective and attention are
those of adapters. Only what is trained differs: the transformer itself stands where the adapter
stands otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from manifests.errors import PipeError
from omnigen_pipe.embedded.learned import CAPTIONS_NAME
from omnigen_pipe.embedded.saved_state import load_state, save_state
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.progress import Progress
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.freezing import freeze_today
from omnigen_pipe.runs.frozen import FrozenSamples, locate
from omnigen_pipe.runs.metrics import METRICS_NAME, MetricsWriter, truncate
from omnigen_pipe.stop import stop_on_signal
from omnigen_pipe.training.batches import BatchReader
from omnigen_pipe.training.gradients import AdapterGradients
from omnigen_pipe.training.loop import Course, train
from omnigen_pipe.training.optimizers import build_optimizer
from omnigen_pipe.training.plan import Plan
from omnigen_pipe.training.trainee import Trainee
from omnigen_pipe.workspace import Workspace

_WIDTH, _BLOCKS, _HEADS, _MLP = 128, 6, 4, 384
#: Largest side of a picture: 16 tokens of 16 pixels.
_TOKENS_A_SIDE = 16


def new_transformer(vocabulary: int, seed: int) -> Any:
    """A random OmniGenTransformer2DModel of about 1.5 M parameters for so many tokens.

    Both of RoPE's factor tables are all ones: nothing here is longer than 4096.
    """
    with quiet_imports():
        from diffusers import OmniGenTransformer2DModel

    torch.manual_seed(seed)
    ones = [1.0] * (_WIDTH // _HEADS // 2)
    return OmniGenTransformer2DModel(
        hidden_size=_WIDTH,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        intermediate_size=_MLP,
        num_layers=_BLOCKS,
        vocab_size=vocabulary,
        pad_token_id=2,
        pos_embed_max_size=_TOKENS_A_SIDE,
        rope_scaling={"type": "su", "short_factor": ones, "long_factor": ones},
    )


def pretrain(
    workspace: Workspace, initial: Path, state: Path, pictures: int, progress: Progress
) -> Any:
    """Train the transformer in the folder `initial` on the workspace's samples as `[train]` says,
    or go on from the file `state`.

    The samples are frozen until there is a state; from then on they must stay the same. Raises
    `PipeError` where they do not, or where there are not `pictures` of them, and `Stopped` where
    a signal asks for it, after the step and with its state saved.
    """
    config = workspace.config.train
    folder = workspace.run_folder(config.tracker_run_name)
    frozen, subject = _samples(workspace, folder / "samples.arrow", state, pictures)
    trainee = _trainee(workspace, initial)
    done = load_state(state, subject, trainee.transformer, trainee.optimizer)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    order = lru_cache(maxsize=2)(lambda epoch: frozen.order(epoch, config, 1))
    epochs, index = divmod(done, len(order(0)))

    def save(position: Position) -> None:
        save_state(
            state,
            workspace.staging,
            subject,
            position.step,
            trainee.transformer,
            trainee.optimizer,
        )

    total = frozen.total_steps(config, 1)
    truncate(folder / METRICS_NAME, done, workspace.staging)
    if done < total:
        with stop_on_signal() as stop, MetricsWriter(folder) as metrics:
            course = Course(reader.read, save, (1.0,) * 4, progress, stop, metrics)
            plan = Plan(Position(done, epochs, index), total, order)
            train(trainee, plan, config, course)
        stop.obey()
    return trainee.transformer.eval()


def _samples(
    workspace: Workspace, path: Path, state: Path, pictures: int
) -> tuple[FrozenSamples, str]:
    """The frozen samples `path`, and what names them in a state."""
    if not state.exists():
        freeze_today(workspace, path, allow_missing=False)
    elif not path.exists():
        raise PipeError(
            f"{state} is there, but {path}, on which it was trained, is gone. Restore it, or "
            f"delete {state}: the pretraining then begins at step 0."
        )
    frozen = FrozenSamples.open(path)
    if len(frozen) != pictures:
        raise PipeError(
            f"{workspace.root} has {len(frozen)} samples ready to be trained on, and {pictures} "
            f"pictures were to be drawn. `omnigen-pipe status -w {workspace.root}` says what "
            f"became of the others. Delete {workspace.root / CAPTIONS_NAME} to have all drawn "
            "again, and run the same command."
        )
    return frozen, f"the samples {blake3().update_mmap(path).hexdigest()}"


def _trainee(workspace: Workspace, initial: Path) -> Trainee:
    """The transformer as its own adapter."""
    device = torch.device("cpu")
    transformer = load_transformer(initial, torch.float32, device).requires_grad_(True)
    parameters = list(transformer.parameters())
    config = workspace.config.train
    return Trainee(
        transformer=transformer,
        network=transformer,
        targets=[],
        device=device,
        dtype=torch.float32,
        sharded=False,
        optimizer=build_optimizer(parameters, config, device),
        gradients=AdapterGradients(parameters),
        ema=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
