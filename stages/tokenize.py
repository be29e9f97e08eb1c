"""tokenize: token ids for every caption that is wanted and not there yet.

Reads samples, writes the `prompts` log. Wanted are the captions of usable samples and the
prompts of dropout, guidance and validation; missing are those without a row for today's
tokenizer. An edited caption therefore costs one tokenisation, and a second run none.
"""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.compute as pc

from manifests.keys import key
from manifests.log import merge_if_crowded
from manifests.query import Source, query
from manifests.schema import PROMPTS
from omnigen_pipe.images.samples import current_samples
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts import tokenizer as tokenizers
from omnigen_pipe.prompts.tokenizer import PromptTokenizer
from omnigen_pipe.prompts.wanted import known_prompts, missing_prompts, wanted_prompts, with_texts
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: Prompts per fragment: a killed run loses at most the seconds that these take.
CHUNK = 100_000

#: Characters of a long prompt that are shown.
_SHOWN = 100


def run(workspace: Workspace, progress: Progress) -> Summary:
    """Tokenise what is missing; raises `PipeError` where samples are missing or stale."""
    samples = current_samples(workspace)
    wanted = wanted_prompts(workspace, samples)
    tokenizer = tokenizers.load_configured(workspace)
    missing = missing_prompts(wanted, known_prompts(workspace, tokenizer.key, ["prompt_key"]))
    inputs = as_text({tokenizer.key: tokenizer.inputs})
    with progress.task("tokenize", missing.num_rows) as advance:
        for start in range(0, missing.num_rows, CHUNK):
            chunk = with_texts(missing.slice(start, CHUNK), workspace, samples)
            workspace.prompts.append(
                _tokenised(chunk, tokenizer),
                inputs=inputs,
                fingerprint=key(tokenizer.key, *chunk["prompt_key"].to_pylist()),
            )
            advance(chunk.num_rows)
    merge_if_crowded(workspace.prompts, workspace.maintenance_lock)

    captions = pc.sum(wanted["is_caption"]).as_py() or 0
    summary = Summary(
        "tokenize",
        changed=missing.num_rows > 0,
        counts={
            "captions": captions,
            "other prompts": wanted.num_rows - captions,
            "tokenised": missing.num_rows,
            "already there": wanted.num_rows - missing.num_rows,
        },
        details={"tokenizer_key": tokenizer.key},
    )
    _describe_lengths(summary, wanted, workspace, samples, tokenizer.key)
    return summary


def _tokenised(chunk: pa.Table, tokenizer: PromptTokenizer) -> pa.Table:
    """The rows of the `prompts` log for a chunk of missing prompts."""
    ids = tokenizer.encode(chunk["text"].to_pylist())
    number = chunk.num_rows
    return pa.table(
        [
            chunk["prompt_key"],
            pa.array([tokenizer.key] * number, pa.string()),
            chunk["text"],
            pa.array(ids, pa.list_(pa.int32())),
            pa.array([len(row) for row in ids], pa.int32()),
            pa.array([time.time_ns()] * number, pa.int64()),
            pa.array(["ok"] * number, pa.string()),
            pa.nulls(number, pa.string()),
        ],
        schema=PROMPTS.schema,
    )


def _describe_lengths(
    summary: Summary,
    wanted: pa.Table,
    workspace: Workspace,
    samples: Source,
    tokenizer_key: str,
) -> None:
    """Add the statistics of prompt lengths, and a note where prompts are longer than asked."""
    lengths = query(
        "SELECT prompt_key, length FROM wanted JOIN known USING (prompt_key)",
        wanted=wanted,
        known=known_prompts(workspace, tokenizer_key, ["prompt_key", "length"]),
    )
    (statistics,) = query(
        """
        SELECT min(length) AS min, median(length) AS median, avg(length) AS mean,
               quantile_cont(length, 0.95) AS p95, max(length) AS max
        FROM lengths
        """,
        lengths=lengths,
    ).to_pylist()
    summary.details["tokens_per_prompt"] = statistics
    limit = workspace.config.prompts.warn_tokens
    if limit == 0:
        return
    long = lengths.filter(pc.greater(lengths["length"], limit))
    if long.num_rows:
        length = pc.max(long["length"]).as_py()
        longest = with_texts(long.filter(pc.equal(long["length"], length)), workspace, samples)
        text = pc.min(longest["text"]).as_py()
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
        which = "1 prompt has" if long.num_rows == 1 else f"{long.num_rows:,} prompts have"
        summary.notes.append(
            f"{which} more than {limit} tokens (warn_tokens); nothing is "
            f"truncated. The longest has {length}: {shown!r}"
        )
        summary.details["long_prompts"] = long.num_rows
