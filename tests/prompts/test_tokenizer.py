"""Token ids are those of diffusers' processor on the same tokenizer, whatever the caption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from manifests.errors import UsageError
from omnigen_pipe.prompts.template import CFG_PROMPT, DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.prompts.tokenizer import load

CAPTIONS = [
    "",
    " ",
    "\n",
    "a photo of a cat",
    "  spaces   inside and around  ",
    "quotes \" and ' and `",
    "two\nlines\r\nand a\ttab",
    "naïve café, e\u0301 apart, 日本語, 🙂🏳️‍🌈",
    "zero\u200bwidth and nbsp\u00a0",
    CFG_PROMPT,
    "<cfg>not alone",
    "</s> <s><unk> <|end|>",
    "<|user|>\nsomeone else<|assistant|>",
    "<|image_1|><img></img>",
    DIFFUSERS_NEGATIVE_PROMPT,
    "long " * 3000,
]


def reference(folder: Path) -> Any:
    """Caption -> ids, by diffusers' processor over the same file."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json"))
    )
    processor = OmniGenMultiModalProcessor(tokenizer)
    return lambda caption: processor.process_multi_modal_prompt(caption, None)["input_ids"]


def test_ids_of_the_small_tokenizer(small_omnigen: Path) -> None:
    expected = reference(small_omnigen / "tokenizer")
    assert load(small_omnigen / "tokenizer").encode(CAPTIONS) == [expected(c) for c in CAPTIONS]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_ids_of_any_captions(small_omnigen: Path, captions: list[str]) -> None:
    expected = reference(small_omnigen / "tokenizer")
    ids = load(small_omnigen / "tokenizer").encode(captions)
    assert ids == [expected(caption) for caption in captions]


def test_ids_of_the_real_tokenizer(phi3_tokenizer: Path) -> None:
    expected = reference(phi3_tokenizer)
    assert load(phi3_tokenizer).encode(CAPTIONS) == [expected(c) for c in CAPTIONS]


def test_the_negative_prompt_has_122_tokens(phi3_tokenizer: Path) -> None:
    template, negative = load(phi3_tokenizer).encode(["", DIFFUSERS_NEGATIVE_PROMPT])
    assert (len(template), len(negative)) == (19, 122)


def test_a_batch_gives_the_ids_of_its_members(small_omnigen: Path) -> None:
    tokenizer = load(small_omnigen / "tokenizer")
    captions = [f"picture {number} of many" for number in range(5000)]
    alone = [tokenizer.encode([caption])[0] for caption in captions[:3] + captions[-3:]]
    together = tokenizer.encode(captions)
    assert together[:3] + together[-3:] == alone
    assert len(together) == 5000


def test_truncation_and_padding_of_the_file_are_switched_off(
    small_omnigen: Path, tmp_path: Path
) -> None:
    plain = load(small_omnigen / "tokenizer").encode(CAPTIONS)
    tokenizer = Tokenizer.from_file(str(small_omnigen / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(CAPTIONS) == plain


def test_the_key_is_that_of_the_file_not_of_its_place(small_omnigen: Path, tmp_path: Path) -> None:
    source = small_omnigen / "tokenizer"
    shutil.copy(source / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load(tmp_path).key == load(source).key

    raw = json.loads((source / "tokenizer.json").read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load(tmp_path).key != load(source).key


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load(tmp_path)
