"""The tokenizer: `tokenizer.json` through the `tokenizers` library, and nothing else.

transformers' `AutoTokenizer` would be the usual way, but its version 5 rebuilds the normaliser
and gives other ids for the same file. The raw file gives the ids that OmniGen was trained with.
Special tokens are recognised in captions too, as diffusers does. What this gives up: settings
that stand only in `tokenizer_config.json` have no effect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from tokenizers import Encoding, Tokenizer

from manifests.errors import UsageError
from manifests.keys import KEY_DIGITS, key
from omnigen_pipe import model_files
from omnigen_pipe.prompts.template import render
from omnigen_pipe.workspace import Workspace

FILE_NAME = "tokenizer.json"

#: Its ids are part of the tokenizer's key, so that a version of the library that reads the same
#: file otherwise gives another key. Spaces, lines, accents, bytes and special tokens occur.
PROBE = 'The  probe: "naïve" cafés,\n42 日本 🙂 <cfg> </s>\tand so on… '

#: Prompts handed to the library at once: it works on them in parallel, and a finished one takes
#: kilobytes until its ids are copied.
_BATCH = 2048


@dataclass(frozen=True)
class PromptTokenizer:
    """A loaded tokenizer; its key changes with its file and with the ids it gives.

    `inputs` are these two, by name.
    """

    tokenizer: Tokenizer
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        """What its ids are kept under."""
        return key(*self.inputs.values())

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of each caption in OmniGen's template: whole, unpadded, in order."""
        return _encode(self.tokenizer, captions)


def _encode(tokenizer: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    def batch(start: int) -> list[Encoding]:
        texts = [render(caption) for caption in captions[start : start + _BATCH]]
        encodings: list[Encoding] = tokenizer.encode_batch_fast(texts)
        return encodings

    ids: list[list[int]] = []
    # The library lets the interpreter go: ids are copied while it is at the next batch.
    with ThreadPoolExecutor(1, "tokenize") as beside:
        starts = range(0, len(captions), _BATCH)
        ahead = deque(beside.submit(batch, start) for start in starts[:1])
        for start in starts:
            if start + _BATCH < len(captions):
                ahead.append(beside.submit(batch, start + _BATCH))
            ids += [encoding.ids for encoding in ahead.popleft().result()]
    return ids


def load(folder: Path) -> PromptTokenizer:
    """The tokenizer in `folder`; raises `UsageError` where there is no usable `tokenizer.json`.

    Truncation and padding that the file may configure are switched off: prompts are kept whole,
    and training pads them itself.
    """
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no {FILE_NAME} in {folder}. pretrained_model_name_or_path must name an "
            "OmniGen whose tokenizer/ has that file; a SentencePiece tokenizer.model is not "
            "enough."
        ) from error
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself, not a subclass
        raise UsageError(
            f"{path} is not a tokenizer that the tokenizers library can read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    (probe,) = _encode(tokenizer, [PROBE])
    digest = blake3(content).hexdigest()[:KEY_DIGITS]
    inputs = {FILE_NAME: digest, "ids of the probe sentence": " ".join(str(i) for i in probe)}
    return PromptTokenizer(tokenizer, inputs)


def load_configured(workspace: Workspace) -> PromptTokenizer:
    """The tokenizer of the workspace's model; raises `UsageError` as `load` does."""
    return load(model_files.model_part(workspace, "tokenizer"))
