"""OmniGen's transformer: diffusers' model, with positions and attention row by row.

The weights, blocks and forward pass are diffusers' own; only the rotary module and the
attention processors are replaced, because the originals let a sample's result depend on its
neighbours in the batch and need a dense mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from manifests.errors import UsageError
from omnigen_pipe.model.attention import MaskFreeAttention, Spans, spans
from omnigen_pipe.model.quantisation import check_available, quantise
from omnigen_pipe.model.rope import RowwiseRotaryEmbedding
from omnigen_pipe.model_files import longest_side
from omnigen_pipe.quiet import quiet_imports

#: Token that fills up shorter prompts on the left, as in the authors' collator.
PADDING_TOKEN = 2


def load_transformer(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    precision: str = "no_change",
    via: str = "cpu",
) -> Any:
    """diffusers' `OmniGenTransformer2DModel` from `folder`, frozen, in `dtype` on `device`.

    Weights come from safetensors only. Loading directly in bfloat16 also keeps the position
    buffer, and with it the residual stream, in bfloat16. `precision` and `via` are those of
    `quantise`: block by block on the way to `device`. Raises `UsageError` where the folder holds
    no such model, or `device` cannot compute `precision`, the latter before anything is loaded.
    """
    check_available(precision, device, dtype)
    with quiet_imports():
        from diffusers import OmniGenTransformer2DModel

    try:
        transformer, loaded = OmniGenTransformer2DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The transformer in {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    # diffusers only warns of what is missing, and leaves it without values.
    missing = set(loaded["missing_keys"])
    missing |= {name for name, parameter in transformer.named_parameters() if parameter.is_meta}
    if missing:
        raise UsageError(
            f"The transformer in {folder} is not whole: {len(missing)} tensors are missing, such "
            f"as {', '.join(sorted(missing)[:3])}. Fetch it again."
        )
    transformer.requires_grad_(False)
    quantise(rowwise(transformer), precision, device, via)
    return transformer.to(device)


def outline(folder: Path) -> Any:
    """The transformer of `folder` as its `config.json` has it: shapes without values.

    On torch's meta device, so it is there in a moment. Raises `UsageError` where it cannot be.
    """
    with quiet_imports():
        from diffusers import OmniGenTransformer2DModel

    try:
        with torch.device("meta"):
            config = OmniGenTransformer2DModel.load_config(folder)
            return OmniGenTransformer2DModel.from_config(config)
    # What diffusers raises for a file that is not there or is not a configuration of its model.
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"The transformer in {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def check_fits(
    config: Mapping[str, Any],
    sizes: Sequence[str],
    largest_token: int,
    remedy: str = "Lower `resolution` and run `omnigen-pipe bucket` again.",
) -> None:
    """Raise `UsageError` where a size (`WIDTHxHEIGHT`) or a token id is beyond what the
    transformer of this `config` has; `remedy` says what to do about a size."""
    limit = longest_side(config)
    for size in sizes:
        if max(int(side) for side in size.split("x")) > limit:
            raise UsageError(
                f"The size {size} is beyond this transformer's {limit} px a side. {remedy}"
            )
    if largest_token >= config["vocab_size"]:
        raise UsageError(
            f"The prompts hold the token id {largest_token}, but this transformer knows "
            f"{config['vocab_size']} tokens: the tokenizer belongs to another model."
        )


def rowwise(transformer: Any) -> Any:
    """Replace rotary module and attention processors in place; returns the transformer."""
    transformer.rope = RowwiseRotaryEmbedding(transformer.rope)
    processor = MaskFreeAttention()
    for block in transformer.layers:
        block.self_attn.set_processor(processor)
    return transformer


def assembled(
    prompts: Sequence[Sequence[int]], image_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Spans]:
    """What the transformer takes beside latents and times, for `prompts` of any lengths L.

    Token ids `[B, max L]`, padded on the left; positions `[B, max L + 1 + image_tokens]`, which
    are 0 on the padding and then 0, 1, 2, … over prompt, time token and image; and the spans.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids = [[PADDING_TOKEN] * (longest - len(p)) + list(p) for p in prompts]
    starts = torch.tensor([longest - n for n in lengths], device=device)
    total = longest + 1 + image_tokens
    positions = (torch.arange(total, device=device)[None] - starts[:, None]).clamp_(min=0)
    return torch.tensor(ids, dtype=torch.int64, device=device), positions, spans(lengths)


def predict_velocity(
    transformer: Any, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The model's velocity for noisy latents; `[B, 4, H/8, W/8]`, in the model's dtype.

    `x_t`: scaled noisy latents `[B, 4, H/8, W/8]`; `t`: times `[B]` in [0, 1], 1 is clean;
    `prompts`: token ids per row, of any lengths.
    """
    # Attention computes neighbours with prompts of one length together. Stacked, not indexed: an
    # index would be copied to the GPU, which waits for all that it has to do.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    if order != list(range(len(order))):
        x_t, t = (torch.stack([x[row] for row in order]) for x in (x_t, t))
        rows = predict_velocity(transformer, x_t, t, [prompts[row] for row in order]).unbind()
        return torch.stack(
            [rows[place] for place in sorted(range(len(order)), key=order.__getitem__)]
        )
    patch = transformer.config.patch_size
    image_tokens = (x_t.shape[-2] // patch) * (x_t.shape[-1] // patch)
    ids, positions, span = assembled(prompts, image_tokens, x_t.device)
    output = transformer(
        hidden_states=x_t.to(transformer.dtype),
        timestep=t,
        input_ids=ids,
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=span,
        position_ids=positions,
        return_dict=False,
    )
    predicted: torch.Tensor = output[0]
    return predicted
