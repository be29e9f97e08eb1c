"""A small tokenizer: byte-level BPE with OmniGen's special tokens, trained on a few sentences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT, render
from omnigen_pipe.world.scenes import imagine

#: Enough for every word of the world and of diffusers' negative prompt.
VOCABULARY = 576

#: Ids 0, 1 and 2 are where Llama's vocabulary, and so Phi-3's and OmniGen's, has them.
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|user|>",
    "<|end|>",
    "<|assistant|>",
    "<|diffusion|>",
    "<cfg>",
    "<img>",
    "</img>",
)


#: White space after these is no token, as in Phi-3's vocabulary.
_STRIPPING = ("</s>", "<|user|>", "<|end|>", "<|assistant|>")


def world_sentences(seed: int) -> list[str]:
    """What the embedded model's tokenizer learns from."""
    draw = random.Random(f"{seed}:tokenizer")
    sentences = [render(imagine(draw).caption) for _ in range(2000)]
    return sentences + [render(DIFFUSERS_NEGATIVE_PROMPT)] * 2


def build_tokenizer(
    folder: Path, sentences: Iterable[str], vocabulary: int, whole: str | None = None
) -> None:
    """Write `tokenizer.json` of at most `vocabulary` tokens into `folder`.

    Words that occur twice or more in `sentences` become tokens of their own, as far as there is
    room, and so does the text `whole`, with the white space after it; all else is spelled in bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - (whole is not None),
        min_frequency=2,
        special_tokens=[
            AddedToken(text, special=True, normalized=False, rstrip=text in _STRIPPING)
            for text in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if whole is not None:
        tokenizer.add_tokens([AddedToken(whole, special=False, normalized=False, rstrip=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
