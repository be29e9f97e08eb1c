"""The template is diffusers' template, and a prompt's key names its text and nothing else."""

from __future__ import annotations

import inspect

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.query import query
from omnigen_pipe.prompts.template import (
    DIFFUSERS_NEGATIVE_PROMPT,
    prompt_key,
    prompt_key_sql,
    render,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@settings(deadline=None)  # the first call imports diffusers
@given(TEXTS)
def test_the_template_is_that_of_diffusers(caption: str) -> None:
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    processor = OmniGenMultiModalProcessor(None)
    assert render(caption) == processor.add_prefix_instruction(caption)


def test_the_negative_prompt_is_that_of_diffusers() -> None:
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    parameters = inspect.signature(OmniGenMultiModalProcessor.__call__).parameters
    assert parameters["negative_prompt"].default == DIFFUSERS_NEGATIVE_PROMPT


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, unique=True))
def test_keys_are_distinct_and_the_same_in_sql(captions: list[str]) -> None:
    keys = [prompt_key(caption) for caption in captions]
    assert len(set(keys)) == len(captions)
    rows = query(
        f"SELECT position, {prompt_key_sql('text')} AS key FROM t ORDER BY position",
        t=pa.table({"text": captions, "position": list(range(len(captions)))}),
    )
    assert rows["key"].to_pylist() == keys
