"""What the stage adds to training: the estimate that stands beside the peak on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from omnigen_pipe.config import LokrConfig, parse
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.trainee import load_trainee
from omnigen_pipe.workspace import Workspace
from stages.train import _estimated


def test_the_estimate_is_of_the_configured_model_and_the_tried_batch(small_omnigen: Path) -> None:
    """At least what is held for certain: base, adapter, gradients, optimizer, in bytes."""
    train = {"mixed_precision": "bf16", "use_ema": True}
    config = parse(
        {"model": {"pretrained_model_name_or_path": str(small_omnigen)}, "train": train}, "test"
    )
    place = Workspace(small_omnigen, config)
    trainee = load_trainee(place, LokrConfig(), torch.device("cpu"))
    base = sum(p.numel() for p in trainee.transformer.parameters())
    adapter = sum(p.numel() for p in trainee.parameters())
    certain = 2 * base + 4 * adapter * (1 + 1 + 2 + 1)
    sizes = []
    for rows in (1, 4):
        latents = torch.zeros(rows, 4, 8, 8)
        batch = Batch(
            sample_ids=["x"] * rows,
            bucket="64x64",
            x1=latents,
            x0=latents,
            t=torch.full((rows,), 0.5),
            prompts=[[2] * 9] * rows,
            regularisation=torch.zeros(rows, dtype=torch.bool),
        )
        sizes.append(_estimated(place, LokrConfig(), batch))
    assert certain < sizes[0] < sizes[1]
