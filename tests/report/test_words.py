"""Captions: every one is counted, and words are counted as Python would."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import image, publish, workspace

from omnigen_pipe.report import words as of_words
from omnigen_pipe.report.words import Words, words
from omnigen_pipe.workspace import Workspace

DATASET = {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel"}
WORDS = st.sampled_from(
    ("a", "Cat", "cat", "it's", "well-kept", "Käfer", "7", "cafe\u0301", "हिन्दी", "น้ำ")
)
CAPTIONS = st.lists(
    st.lists(WORDS, max_size=12).map(" ".join) | st.sampled_from(("", "  ", ", …")), max_size=4
)


def of(place: Workspace, captions: list[list[str]], seed: int = 0) -> Words:
    publish(place, [image("a", f"{n}.png", captions=texts) for n, texts in enumerate(captions)])
    return words(place, seed, None)


@settings(max_examples=25, deadline=None)
@given(st.lists(CAPTIONS, max_size=12))
def test_all_captions_are_counted_once(captions: list[list[str]]) -> None:
    with TemporaryDirectory() as folder:
        found = of(workspace(Path(folder), DATASET), captions)
    every = [text for texts in captions for text in texts]
    assert found.captions == len(every) == sum(bar.count for bar in found.lengths)
    assert found.empty == sum(not text.strip() for text in every)
    assert found.distinct == len(set(every))
    assert found.most == max(map(len, every), default=0)
    said = Counter(
        word for text in every for word in {w.lower() for w in text.split() if w[0].isalnum()}
    )
    assert {row["word"]: row["n"] for row in found.words} == said
    counts = [row["n"] for row in found.words]
    assert counts == sorted(counts, reverse=True)
    lengths = [row["length"] for row in found.longest]
    assert lengths == sorted({text: len(text) for text in every if text.strip()}.values())[::-1][:8]
    empty = {f"{n}.png" for n, texts in enumerate(captions) if any(not t.strip() for t in texts)}
    assert {row["path"] for row in found.empty_images} == empty


def test_bars_are_few_however_long_captions_are(tmp_path: Path) -> None:
    place = workspace(tmp_path, DATASET)
    for longest in (1, 15, 16, 77, 160, 12345):
        found = of(place, [["x" * length] for length in (1, longest)])
        assert sum(bar.count for bar in found.lengths) == 2
        assert len(found.lengths) <= 16


def test_words_of_many_captions_are_those_of_a_random_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_words, "MOST_COUNTED", 10)
    place = workspace(tmp_path, DATASET)
    captions = [[f"w{n}"] for n in range(40)]
    found = of(place, captions)
    assert (found.captions, found.counted, len(found.words)) == (40, 10, 10)
    assert found.words == of(place, captions).words
    assert found.words != of(place, captions, seed=1).words
