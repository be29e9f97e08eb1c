"""Content addresses: what has the same key is the same thing, wherever it lies.

A key is the first 128 bits, in hex, of SHA-256 over the fields, each written as its length in
bytes, a colon, and its UTF-8 text. The lengths make ("ab", "c") and ("a", "bc") differ. The
same function exists twice, for single values in Python and set-wise as a DuckDB expression;
a test holds them against each other.
"""

from __future__ import annotations

import hashlib

#: Hex digits of a key: 128 bits.
KEY_DIGITS = 32


def key(*fields: str | int) -> str:
    """The key of `fields`, in order; integers count as their decimal text."""
    texts = [str(field).encode("utf-8") for field in fields]
    content = b"".join(b"%d:%b" % (len(text), text) for text in texts)
    return hashlib.sha256(content).hexdigest()[:KEY_DIGITS]


def key_sql(*expressions: str) -> str:
    """A DuckDB expression with the same value as `key` of the given column expressions.

    Null in any field gives null: a row without, say, a content hash has no key. Give columns: an
    expression may be computed three times.
    """
    # One call that joins all is faster than an operator between each two, but leaves nulls out.
    texts = ", ".join(
        f"strlen(CAST(({e}) AS VARCHAR)), ':', CAST(({e}) AS VARCHAR)" for e in expressions
    )
    absent = " OR ".join(f"({e}) IS NULL" for e in expressions)
    return f"CASE WHEN {absent} THEN NULL ELSE left(sha256(concat({texts})), {KEY_DIGITS}) END"
