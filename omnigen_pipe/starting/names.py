"""Names of files that read like captions, told from those that cameras and programs give.

A guess by form alone: nothing here knows words. It only decides what `init` proposes.
"""

from __future__ import annotations

import re

from omnigen_pipe.images.captions import from_name

#: What cameras, telephones and programs call pictures; a number or nothing follows.
_MACHINE = re.compile(
    r"(img|imgp|dsc|dscn|dscf|sam|pxl|mvimg|gopr|dji|cimg|image|photo|picture|pic|frame|scan|"
    r"screen ?shot|bildschirmfoto|whatsapp image|signal|untitled|unnamed|download|copy of|"
    r"clipboard|snapshot)(?![^\W\d_])",
    re.IGNORECASE,
)
#: Hexadecimal digits, perhaps in groups, as in content hashes and UUIDs.
_HASH = re.compile(r"(?=.*\d)[0-9a-f]{6,}([- ][0-9a-f]+)*", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2,}(['’][^\W\d_]+)?")
#: A name is a caption from so many words on: one alone is a tag, or somebody's account.
_FEWEST_WORDS = 2
#: So many letters are a phrase in a script that needs no spaces.
_FEWEST_UNSPACED = 4


def reads_like_caption(path: str) -> bool:
    """Whether the caption that `path` gives by `filename` has words in it."""
    text = from_name(path)
    if _MACHINE.match(text) or _HASH.fullmatch(text):
        return False
    parts = re.split(r"[\s,.;:!?()-]+", text)
    words = [part for part in parts if _WORD.fullmatch(part)]
    unspaced = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]", text)
    return len(words) >= _FEWEST_WORDS or len(unspaced) >= _FEWEST_UNSPACED
