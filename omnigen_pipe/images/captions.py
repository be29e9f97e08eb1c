"""Captions of an image: from its name, an instance prompt, a text file beside it, or a list.

Every caption is stripped of white space at its ends; inside, it is left as it is. An image
may have several, and one without any is rejected by discover, never given an empty one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omnigen_pipe.config import DatasetConfig

#: `caption_strategy` values that take captions from `list_file`.
LIST_STRATEGIES = ("jsonl", "csv", "parquet")

#: Halves of characters, which JSON can write and UTF-8 cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one image, and the file they came from.

    `path` is from the dataset's root for a text file, as configured for a list, and None where
    no file was involved. `size` (bytes) and `mtime_ns` are that file's. `reason` says why there
    is no caption, and is None where there is one.
    """

    texts: tuple[str, ...]
    path: str | None = None
    size: int | None = None
    mtime_ns: int | None = None
    reason: str | None = None


def from_name(path: str) -> str:
    """The caption in a file's name: without folder and extension, underscores as spaces.

    SimpleTuner's `filename` strategy does the same.
    """
    return path[path.rfind("/") + 1 : _stem_end(path)].replace("_", " ").strip()


def _stem_end(path: str) -> int:
    """Where the extension of `path` begins: as pathlib has it, which takes ten times as long."""
    name, dot = path.rfind("/") + 1, path.rfind(".")
    return dot if name < dot < len(path) - 1 else len(path)


def split_text(text: str, lines: str) -> list[str]:
    """The captions in a text file: its lines that are not blank.

    `lines` is the dataset's `textfile_lines`: `captions` gives one caption a line, `join` one
    caption of all lines with a space between them. Only line feeds and carriage returns end a
    line.
    """
    stripped = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    kept = [line for line in stripped if line]
    return [" ".join(kept)] if lines == "join" and kept else kept


def finish(texts: Iterable[str], dataset: DatasetConfig) -> tuple[str, ...]:
    """`texts` as captions of `dataset`: stripped, without empty and repeated ones, and with the
    instance prompt before each where `prepend_instance_prompt` asks for it."""
    kept = [text.strip() for text in texts]
    prefix = ""
    if dataset.prepend_instance_prompt and dataset.caption_strategy != "instanceprompt":
        prefix = f"{dataset.instance_prompt} "
    return tuple(dict.fromkeys(prefix + text for text in kept if text))


def without_file(path: str, dataset: DatasetConfig) -> Captions:
    """The captions by `filename` or `instanceprompt` of the image at `path`."""
    (text,) = texts_without_file([path], dataset)
    return Captions((text,)) if text else Captions((), reason=why_none(dataset))


def texts_without_file(paths: Sequence[str], dataset: DatasetConfig) -> list[str]:
    """The same for many images, which have one caption each; empty where there is none."""
    if dataset.caption_strategy == "instanceprompt":
        return ["".join(finish([dataset.instance_prompt or ""], dataset))] * len(paths)
    # As `from_name`, without two calls for each of perhaps a million files.
    names = [
        (stem if stem and extension else name).replace("_", " ").strip()
        for name in [path.rpartition("/")[2] for path in paths]
        for stem, _, extension in (name.rpartition("."),)
    ]
    if not dataset.prepend_instance_prompt:
        return names
    return ["".join(finish([name], dataset)) for name in names]


def why_none(dataset: DatasetConfig) -> str:
    """Why an image has no caption by `filename` or `instanceprompt`."""
    if dataset.caption_strategy == "instanceprompt":
        return "no caption: instance_prompt is empty"
    return "no caption: the file's name has no words"


def textfile_of(path: str) -> str:
    """The path of the text file beside the image at `path`: the same name, ending in `.txt`."""
    return path[: _stem_end(path)] + ".txt"


def from_textfile(
    root: Path, path: str, dataset: DatasetConfig, known: Captions | None = None
) -> Captions:
    """The captions in the `.txt` beside the image at `path` (from `root`), read as UTF-8.

    `known` is what an earlier call returned for the same image and options: where the text
    file has its size and modification time still, it is not opened.
    """
    beside = textfile_of(path)
    full = os.path.join(root, beside)
    try:
        facts = os.stat(full)
        if known is not None and (known.path, known.size, known.mtime_ns) == (
            beside,
            facts.st_size,
            facts.st_mtime_ns,
        ):
            return known
        if not stat.S_ISREG(facts.st_mode):
            return Captions((), reason="no caption: its .txt is not a regular file")
        with open(full, "rb") as handle:
            raw = handle.read()
    except FileNotFoundError:
        return Captions((), reason="no caption: there is no .txt beside the image")
    except OSError as error:
        return Captions((), reason=f"no caption: its .txt is unreadable: {error.strerror}")
    reason = None
    texts: tuple[str, ...] = ()
    try:
        texts = finish(split_text(raw.decode("utf-8-sig"), dataset.textfile_lines), dataset)
    except UnicodeDecodeError:
        reason = "no caption: its .txt is not UTF-8"
    if not texts and reason is None:
        reason = "no caption: its .txt is empty"
    return Captions(texts, beside, facts.st_size, facts.st_mtime_ns, reason)


def from_value(value: object) -> tuple[list[str], str | None]:
    """The texts in one cell of a list, and why there are none: a text, or a list of texts."""
    texts: list[str] = []
    for text in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(text, str):
            texts.append(text)
        elif text is not None:
            return [], "no caption: the list's caption is not a text"
    if any(_SURROGATE.search(text) for text in texts):
        return [], "no caption: the list's caption is not valid Unicode"
    if not any(text.strip() for text in texts):
        return [], "no caption: the list's caption is empty"
    return texts, None
