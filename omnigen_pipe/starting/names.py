"""Names of files that read like captions, told from those that cameras and programs give.

A guess by form alone: nothing here knows words. It only decides what `init` proposes.
"""

from __future__ import annotations

import re

from omnigen_pipe.images.captions import from_name

#: What cameras, telephones and programs call pictures; words may follow ("photo of a bird").
_MACHINE = re.compile(
    r"(img|imgp|dsc|dscn|dscf|sam|pxl|mvimg|gopr|dji|cimg|image|photo|picture|pic|frame|scan|"
    r"screen ?shot|whatsapp image|signal|untitled|unnamed|download|clipboard|snapshot)"
    r"(?![^\W\d_])",
    re.IGNORECASE,
)
#: What such names put between their numbers: "Screenshot 2023-01-02 at 12.30 PM (copy)".
_FILLERS = frozenset({"at", "am", "pm", "copy", "edited", "burst", "night", "portrait"})
#: Hexadecimal digits, perhaps in groups, as in content hashes and UUIDs.
_HASH = re.compile(r"(?=.*\d)[0-9a-f]{6,}([- ][0-9a-f]+)*", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(['’][^\W\d_]+)?")
#: A name is a caption from so many words on: one alone is a tag, or somebody's account.
_FEWEST_WORDS = 2
#: One of the words has at least so many letters.
_SHORTEST = 3
#: Letters of scripts that need no spaces, and how many of them are a phrase.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")
_FEWEST_UNSPACED = 4


def reads_like_caption(path: str) -> bool:
    """Whether the caption that `path` gives by `filename` has words in it."""
    text = from_name(path)
    if _HASH.fullmatch(text):
        return False
    fillers: frozenset[str] = frozenset()
    if machine := _MACHINE.match(text):
        text, fillers = text[machine.end() :], _FILLERS
    parts = re.split(r"[\s,.;:!?()-]+", text)
    words = [part for part in parts if _WORD.fullmatch(part) and part.lower() not in fillers]
    if len(words) >= _FEWEST_WORDS and max(map(len, words)) >= _SHORTEST:
        return True
    return len(_UNSPACED.findall(text)) >= _FEWEST_UNSPACED
