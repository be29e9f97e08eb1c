"""Which prompts are wanted, and which of them the log lacks.

A million prompts are planned by their keys alone; their texts are looked up where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from manifests.query import Source, query
from manifests.schema import PROMPTS
from manifests.views import current_prompts
from omnigen_pipe.prompts.library import prompts_besides_captions
from omnigen_pipe.prompts.template import prompt_key_sql
from omnigen_pipe.workspace import Workspace


def wanted_prompts(workspace: Workspace, samples: pa.Table | Source) -> pa.Table:
    """One row per wanted prompt: `prompt_key`, `is_caption`, in order of the key.

    Wanted are the captions of usable samples, and the prompts of dropout, guidance and
    validation.
    """
    return query(
        f"""
        WITH keys AS (
            SELECT unnest(prompt_keys) AS prompt_key, true AS is_caption
            FROM samples WHERE status = 'ok'
            UNION ALL
            SELECT {prompt_key_sql("text")}, false FROM others
        )
        SELECT prompt_key, bool_or(is_caption) AS is_caption
        FROM keys GROUP BY prompt_key ORDER BY prompt_key
        """,
        samples=samples,
        others=_others(workspace),
    )


def known_prompts(
    workspace: Workspace, tokenizer_key: str, columns: Sequence[str] = PROMPTS.schema.names
) -> pa.Table:
    """The rows of the prompts log that count for this tokenizer and have ids."""
    names = list(dict.fromkeys([*columns, "status"]))
    return query(
        f"SELECT {', '.join(columns)} FROM prompts WHERE status = 'ok'",
        prompts=current_prompts(workspace.prompts.source(), tokenizer_key, names),
    )


def missing_prompts(wanted: pa.Table, known: pa.Table) -> pa.Table:
    """`prompt_key` of the wanted prompts that are not known, in order of the key."""
    return query(
        "SELECT prompt_key FROM wanted ANTI JOIN known USING (prompt_key) ORDER BY prompt_key",
        wanted=wanted,
        known=known.select(["prompt_key"]),
    )


def with_texts(prompts: pa.Table, workspace: Workspace, samples: pa.Table | Source) -> pa.Table:
    """`prompt_key` and `text` of wanted `prompts`, in order of the key."""
    return query(
        f"""
        WITH texts AS (
            SELECT unnest(prompt_keys) AS prompt_key, unnest(captions) AS text
            FROM samples WHERE status = 'ok'
            UNION ALL
            SELECT {prompt_key_sql("text")}, text FROM others
        )
        SELECT prompt_key, any_value(text) AS text FROM texts SEMI JOIN prompts USING (prompt_key)
        GROUP BY prompt_key ORDER BY prompt_key
        """,
        samples=samples,
        others=_others(workspace),
        prompts=prompts.select(["prompt_key"]),
    )


def _others(workspace: Workspace) -> pa.Table:
    return pa.table({"text": pa.array(prompts_besides_captions(workspace), pa.string())})
