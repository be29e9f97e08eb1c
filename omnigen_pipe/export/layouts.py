"""The two layouts that a merged model is written in: which tensor has which name where.

`diffusers` is the layout that the base is read in. `omnigen` is the authors' (`OmniGen/model.py`
of VectorSpaceLab/OmniGen, published as Shitao/OmniGen-v1): the blocks are those of transformers'
Phi-3, in which q, k and v are one weight, their rows one after the other. Everything else is only
named differently: both chunk adaLN's output into shift and scale, the MLP's into gate and up, and
both have the position embedding as a buffer that is stored. Pure: no tensors, only names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manifests.errors import UsageError

Layout = Literal["diffusers", "omnigen"]


@dataclass(frozen=True)
class Target:
    """One tensor of an export: its name, and the base's tensors whose rows it is made of."""

    name: str
    parts: tuple[str, ...]


#: diffusers' names before the last dot or index, and the authors'.
_AUTHORS = {
    "patch_embedding.pos_embed": "pos_embed",
    "patch_embedding.output_image_proj": "x_embedder.proj",
    "patch_embedding.input_image_proj": "input_x_embedder.proj",
    "time_token.linear_1": "time_token.mlp.0",
    "time_token.linear_2": "time_token.mlp.2",
    "t_embedder.linear_1": "t_embedder.mlp.0",
    "t_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "embed_tokens": "llm.embed_tokens",
    "norm": "llm.norm",
}
#: The same within a block.
_AUTHORS_BLOCK = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.to_out.0": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_FUSED = ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v")
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def targets(layout: Layout, names: Iterable[str]) -> list[Target]:
    """The tensors of an export in `layout` of a transformer with tensors of these `names`.

    Every name is part of exactly one of them. Raises `UsageError` for a name that the authors'
    layout has no place for.
    """
    ordered = sorted(names)
    if layout == "diffusers":
        return [Target(name, (name,)) for name in ordered]
    here = set(ordered)
    found, unplaced = [], []
    for name in ordered:
        block = _BLOCK.fullmatch(name)
        if block and block[2] in _FUSED:
            start = f"layers.{block[1]}."
            parts = tuple(f"{start}{part}.weight" for part in _FUSED)
            if not here.issuperset(parts):
                unplaced.append(name)
            elif name == parts[0]:
                found.append(Target(f"llm.{start}self_attn.qkv_proj.weight", parts))
            continue
        stem, _, end = name.rpartition(".")
        if block and block[2] in _AUTHORS_BLOCK:
            place = f"llm.layers.{block[1]}.{_AUTHORS_BLOCK[block[2]]}.weight"
        elif name in _AUTHORS:
            place = _AUTHORS[name]
        elif stem in _AUTHORS and end in ("weight", "bias"):
            place = f"{_AUTHORS[stem]}.{end}"
        else:
            unplaced.append(name)
            continue
        found.append(Target(place, (name,)))
    if unplaced:
        raise UsageError(
            f"The authors' layout has no place for {len(unplaced)} tensors of this transformer, "
            f"such as {unplaced[0]}. Export it with `--layout diffusers`."
        )
    return sorted(found, key=lambda target: target.name)


#: Entries of diffusers' transformer configuration by their names in transformers' `Phi3Config`.
_PHI3 = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_base",
    "pad_token_id": "pad_token_id",
}


def phi3_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The authors' `config.json`, from diffusers' transformer configuration.

    `dtype` is torch's name of what the weights are stored in, None where they are mixed. Raises
    `UsageError` where an entry is missing.
    """
    try:
        rope = config["rope_scaling"]
        # Older releases of transformers take exactly these three; newer ones no longer read the
        # type by its former name, `su`.
        scaling = {
            "type": "longrope",
            "short_factor": list(rope["short_factor"]),
            "long_factor": list(rope["long_factor"]),
        }
        entries = {name: config[ours] for name, ours in _PHI3.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"The transformer's config.json is not that of an OmniGen: {error!r}."
        ) from error
    fixed: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_scaling": scaling,
    }
    return {**fixed, **entries, **({"torch_dtype": dtype} if dtype else {})}


#: What the authors' code takes as given, and reads from no configuration.
_GIVEN = {
    "in_channels": 4,
    "patch_size": 2,
    "pos_embed_max_size": 192,
    "time_step_dim": 256,
    "flip_sin_to_cos": True,
    "downscale_freq_shift": 0,
    "timestep_activation_fn": "silu",
}


def beyond_authors(config: Mapping[str, Any]) -> list[str]:
    """What in diffusers' transformer configuration the authors' code cannot be told: sentences."""
    return [
        f"The authors' code takes {name} = {given} as given, and this model has {config[name]}: "
        "it reads the export only where that is changed there."
        for name, given in _GIVEN.items()
        if name in config and config[name] != given
    ]
