"""OmniGen's shapes without its numbers: the transformer and its adapter on the meta device.

A tensor on the meta device has a shape and a dtype and no storage, so the whole model is there
in a moment. It is built by the classes that training uses, and so has their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model.lokr import attach
from omnigen_pipe.model.transformer import rowwise
from omnigen_pipe.model_files import local_model_part, transformer_config
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.workspace import Workspace

Architecture = Mapping[str, Any]

#: `transformer/config.json` of OmniGen-v1, for when it is not at hand. The defaults of diffusers'
#: `OmniGenTransformer2DModel`, written out, are OmniGen-v1's sizes; its rotary factors are left
#: out, because only their number (half a head) has a size.
OMNIGEN_V1: Architecture = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "num_layers": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "pos_embed_max_size": 192,
    "time_step_dim": 256,
}


def architecture(workspace: Workspace) -> Architecture:
    """The configured model's `transformer/config.json` where it is here, else OmniGen-v1's.

    Never downloads. Raises `UsageError` where the model folder or its file is not usable.
    """
    folder = local_model_part(workspace, "transformer")
    if folder is None:
        return OMNIGEN_V1
    return transformer_config(folder)


def blocks(shapes: Architecture) -> int:
    """How many transformer blocks the model has."""
    return int(shapes.get("num_layers", OMNIGEN_V1["num_layers"]))


def transformer_of(shapes: Architecture, depth: int, dtype: torch.dtype) -> Any:
    """The frozen transformer with `depth` blocks, as `load_transformer` would give it, on meta."""
    with quiet_imports():
        from diffusers import OmniGenTransformer2DModel

    width = shapes.get("hidden_size", OMNIGEN_V1["hidden_size"])
    heads = shapes.get("num_attention_heads", OMNIGEN_V1["num_attention_heads"])
    factors = [1.0] * (width // heads // 2)
    given = {"short_factor": factors, "long_factor": factors, **(shapes.get("rope_scaling") or {})}
    with torch.device("meta"):
        transformer = OmniGenTransformer2DModel.from_config(
            {**shapes, "num_layers": depth, "rope_scaling": given}
        )
        # diffusers' own `to` warns of modules to keep in float32 even where there are none.
        torch.nn.Module.to(transformer, dtype)
        transformer.requires_grad_(False)
        return rowwise(transformer)


def adapted(
    shapes: Architecture, depth: int, lokr: LokrConfig, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The same with the configured adapter attached: transformer and LyCORIS' network."""
    transformer = transformer_of(shapes, depth, dtype)
    with torch.device("meta"):
        return transformer, attach(transformer, lokr, seed=0)
