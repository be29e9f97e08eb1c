"""OmniGen's prompt template, and the key of a prompt.

The text is the one that OmniGen was trained with; its source is `add_prefix_instruction` in
the authors' `OmniGen/processor.py` and in diffusers' `OmniGenMultiModalProcessor`.
"""

from __future__ import annotations

from manifests.keys import key, key_sql

#: The sentence before every prompt.
INSTRUCTION = "Generate an image according to the following instructions"
_PREFIX = f"<|user|>\n{INSTRUCTION}\n"
_SUFFIX = "<|end|>\n<|assistant|>\n<|diffusion|>"

#: The prompt that stands for "no prompt" in OmniGen's training.
CFG_PROMPT = "<cfg>"

#: The negative prompt that diffusers' `OmniGenPipeline` guides against.
DIFFUSERS_NEGATIVE_PROMPT = (
    "low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated, extra fingers, mutated "
    "hands, poorly drawn hands, poorly drawn face, mutation, deformed, blurry, dehydrated, bad "
    "anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, "
    "malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too "
    "many fingers."
)


def render(caption: str) -> str:
    """The text that is tokenised for `caption`."""
    return f"{_PREFIX}{caption}{_SUFFIX}"


#: Names the template in keys: another template gives other prompts.
TEMPLATE_KEY = key(_PREFIX, _SUFFIX)


def prompt_key(caption: str) -> str:
    """The key of `caption` in the template."""
    return key(TEMPLATE_KEY, caption)


def prompt_key_sql(expression: str) -> str:
    """The same as a DuckDB expression over a caption column."""
    return key_sql(f"'{TEMPLATE_KEY}'", expression)
