"""Which prompts are wanted, and which of them the log lacks."""

from __future__ import annotations

import pyarrow as pa

from manifests.query import Source, query
from manifests.views import current_prompts
from omnigen_pipe.prompts.library import prompts_besides_captions
from omnigen_pipe.prompts.template import prompt_key_sql
from omnigen_pipe.workspace import Workspace


def wanted_prompts(workspace: Workspace, samples: pa.Table | Source) -> pa.Table:
    """One row per wanted prompt: `prompt_key`, `text`, `is_caption`, in order of the key.

    Wanted are the captions of usable samples, and the prompts of dropout, guidance and
    validation.
    """
    others = prompts_besides_captions(workspace)
    return query(
        f"""
        WITH texts AS (
            SELECT unnest(captions) AS text, true AS is_caption FROM samples WHERE status = 'ok'
            UNION ALL
            SELECT text, false FROM others
        )
        SELECT {prompt_key_sql("text")} AS prompt_key, text, bool_or(is_caption) AS is_caption
        FROM texts GROUP BY text ORDER BY prompt_key
        """,
        samples=samples,
        others=pa.table({"text": pa.array(others, pa.string())}),
    )


def known_prompts(workspace: Workspace, tokenizer_key: str) -> pa.Table:
    """The rows of the prompts log that count for this tokenizer and have ids."""
    return query(
        "SELECT * FROM prompts WHERE status = 'ok'",
        prompts=current_prompts(workspace.prompts.source(), tokenizer_key),
    )


def missing_prompts(wanted: pa.Table, known: pa.Table) -> pa.Table:
    """`prompt_key` and `text` of the wanted prompts that are not known, in order of the key."""
    return query(
        "SELECT prompt_key, text FROM wanted ANTI JOIN known USING (prompt_key) ORDER BY ALL",
        wanted=wanted,
        known=known.select(["prompt_key"]),
    )
