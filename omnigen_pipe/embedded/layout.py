"""What surrounds the weights in diffusers' layout: OmniGen's scheduler, and the index of parts."""

from __future__ import annotations

import json
from pathlib import Path

from omnigen_pipe.quiet import quiet_imports

_INDEX = {
    "_class_name": "OmniGenPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "OmniGenTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_scheduler_and_index(folder: Path) -> None:
    """Write `scheduler/` with OmniGen's settings, and `model_index.json`, into `folder`."""
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    scheduler.save_pretrained(folder / "scheduler")
    text = json.dumps(_INDEX, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
