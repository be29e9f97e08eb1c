"""Captions: how long they are, which are empty, and what they say most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.query import query
from manifests.views import current_prompts
from omnigen_pipe.report.shapes import Bar
from omnigen_pipe.workspace import Workspace

#: So many of the longest captions, of the images with empty ones, and of the words are shown.
_LONGEST, _EMPTY, _WORDS = 8, 20, 60
#: Words are counted in so many captions: more say nothing else.
MOST_COUNTED = 200_000
#: A histogram has at most so many bars.
_BARS = 16

#: One row per caption of every image that was read, used or not.
_CAPTIONS = """
    captions AS (
        SELECT dataset, path, unnest(captions) AS caption FROM images
        WHERE status = 'ok' AND captions IS NOT NULL
    )
"""


@dataclass(frozen=True)
class Words:
    """`captions` counts all, `empty` those without a letter. Lengths are in characters, and in
    tokens of the whole prompt where it is tokenised. `longest` have path (of one image), caption,
    length and images; `empty_images` dataset and path. `counted` captions were looked at for
    `words`: word, and `n` captions that have it."""

    captions: int
    empty: int
    mean: float
    most: int
    distinct: int
    lengths: list[Bar]
    tokens: list[Bar]
    longest: list[dict[str, Any]]
    empty_images: list[dict[str, Any]]
    words: list[dict[str, Any]]
    counted: int


def words(workspace: Workspace, seed: int, tokenizer_key: str | None) -> Words:
    """The captions of a workspace; words are of a sample drawn with `seed` where they are many.
    Tokens are those of the tokenizer `tokenizer_key`, where it is known."""
    images = workspace.images.source()
    facts = query(
        f"""
        WITH {_CAPTIONS}
        SELECT count(*) AS captions, count(*) FILTER (trim(caption) = '') AS empty,
               coalesce(avg(length(caption)), 0) AS mean, coalesce(max(length(caption)), 0) AS most,
               count(DISTINCT caption) AS distinct_ones
        FROM captions
        """,
        images=images,
    ).to_pylist()[0]
    longest = query(
        f"""
        WITH {_CAPTIONS}
        SELECT min(path) AS path, caption, length(caption) AS length, count(*) AS images
        FROM captions WHERE trim(caption) <> ''
        GROUP BY caption ORDER BY length DESC, caption LIMIT $1
        """,
        _LONGEST,
        images=images,
    ).to_pylist()
    empty = query(
        f"""
        WITH {_CAPTIONS}
        SELECT DISTINCT dataset, path FROM captions WHERE trim(caption) = ''
        ORDER BY dataset, path LIMIT $1
        """,
        _EMPTY,
        images=images,
    ).to_pylist()
    return Words(
        captions=facts["captions"],
        empty=facts["empty"],
        mean=facts["mean"],
        most=facts["most"],
        distinct=facts["distinct_ones"],
        lengths=_lengths(workspace, facts["most"]),
        tokens=[] if tokenizer_key is None else _tokens(workspace, tokenizer_key),
        longest=longest,
        empty_images=empty,
        words=_most_frequent(workspace, seed),
        counted=min(facts["captions"], MOST_COUNTED),
    )


def _step(most: int) -> int:
    """A round width of bars, so that those up to `most` are few."""
    for power in range(12):
        for digit in (1, 2, 5):
            if most < digit * 10**power * _BARS:
                return int(digit * 10**power)
    return most  # of no caption that there is


def _bars(rows: list[dict[str, Any]], step: int) -> list[Bar]:
    counts = {row["place"]: row["n"] for row in rows}
    if not counts:
        return []
    places = range(min(counts), max(counts) + 1)
    return [
        Bar(f"{place * step:,}" if step == 1 else f"{place * step:,}–{(place + 1) * step - 1:,}",
            counts.get(place, 0), {})
        for place in places
    ]  # fmt: skip


def _lengths(workspace: Workspace, most: int) -> list[Bar]:
    step = _step(most)
    rows = query(
        f"""
        WITH {_CAPTIONS}
        SELECT length(caption) // $1 AS place, count(*) AS n FROM captions GROUP BY place
        """,
        step,
        images=workspace.images.source(),
    ).to_pylist()
    return _bars(rows, step)


def _tokens(workspace: Workspace, tokenizer_key: str) -> list[Bar]:
    """Tokens of the prompts of usable samples, template and all; none where none is known."""
    lengths = current_prompts(
        workspace.prompts.source(), tokenizer_key, ["prompt_key", "length", "status"]
    )
    if not lengths.num_rows:
        return []
    most = query("SELECT max(length) AS most FROM lengths", lengths=lengths)["most"][0].as_py()
    step = _step(most or 0)
    rows = query(
        """
        WITH wanted AS (
            SELECT unnest(prompt_keys) AS prompt_key FROM samples WHERE status = 'ok'
        )
        SELECT length // $1 AS place, count(*) AS n
        FROM wanted JOIN lengths USING (prompt_key) WHERE lengths.status = 'ok' GROUP BY place
        """,
        step,
        samples=workspace.samples.source(),
        lengths=lengths,
    ).to_pylist()
    return _bars(rows, step)


def _most_frequent(workspace: Workspace, seed: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(
        f"""
        WITH {_CAPTIONS}, counted AS (
            SELECT caption FROM captions ORDER BY md5(dataset || path || $1) LIMIT $2
        ), said AS (
            SELECT unnest(list_distinct(regexp_extract_all(
                lower(caption), '[\\p{{L}}\\p{{N}}][\\p{{L}}\\p{{M}}\\p{{N}}''’-]*'
            ))) AS word FROM counted
        )
        SELECT word, count(*) AS n FROM said GROUP BY word ORDER BY n DESC, word LIMIT $3
        """,
        str(seed),
        MOST_COUNTED,
        _WORDS,
        images=workspace.images.source(),
    ).to_pylist()
    return found
