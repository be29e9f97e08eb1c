"""A small CLIP with random weights, in transformers' folder layout, built in a moment."""

from __future__ import annotations

from pathlib import Path

from omnigen_pipe.quiet import quiet_imports

#: Tokens of a text that it reads, its first and last included.
LENGTH = 12


def build_small_clip(folder: Path, seed: int = 1) -> Path:
    """Build model, image processor and tokenizer; returns `folder`. Leaves torch's global random
    state as it was."""
    import torch

    with quiet_imports():
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges = ["r e", "re d</w>", "c i", "ci r"]
    pieces = [*letters, *(f"{one}</w>" for one in letters)]
    pieces += [merge.replace(" ", "") for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges])
    tokenizer.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    images.save_pretrained(folder)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {
        **shape,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": LENGTH,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {**shape, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for name, parameter in model.named_parameters():  # so that features lie far apart
            norm = "norm" in name and name.endswith("weight")
            torch.nn.init.normal_(parameter, float(norm), 0.3 if parameter.ndim > 1 else 0.02)
    model.save_pretrained(folder)
    return folder
