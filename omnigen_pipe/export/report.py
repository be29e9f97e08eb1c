"""What a person must know of an export, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omnigen_pipe.export.base import Base
from omnigen_pipe.export.layouts import Layout, beyond_authors
from omnigen_pipe.export.merged import Merged

#: A smaller share of the adapter's change, or a larger error, is worth a word of advice.
_SHARE, _ERROR = 0.95, 0.5


def notes(
    merged: Merged,
    dtype: str,
    base: Base,
    layout: Layout,
    config: Mapping[str, Any],
    leftovers: list[str],
) -> list[str]:
    """What survived in `dtype`, what the reader of `layout` must know, and what lies about.

    `config` is the transformer's; `leftovers` are of `folder.leftovers`.
    """
    found = []
    worst, overall = merged.worst, merged.overall
    if worst is None or overall.share is None:
        found.append("The adapter changes nothing: these are the base's weights.")
    else:
        least = merged.survivals[worst].share or 0.0
        error = overall.relative_error or 0.0
        found.append(
            f"Of the adapter's change {overall.share:.1%} survives in {dtype}, with an error of "
            f"{error:.1%} of its size; least of {worst}: {least:.1%}."
        )
        if dtype != "fp32" and (overall.share < _SHARE or error > _ERROR):
            lost = overall.share < _SHARE
            found.append(
                f"{'Much of it is lost' if lost else 'The noise of rounding is large beside it'}: "
                "the change is small beside the distance between two numbers of that dtype. "
                "--dtype fp32 keeps it, and so does the adapter itself, used beside the base."
            )
    if layout == "omnigen":
        found += beyond_authors(config)
    elif "model_index.json" not in {path.name for path in base.beside}:
        found.append(
            "The base has no model_index.json: the parts can be loaded, a whole pipeline cannot."
        )
    if leftovers:
        found.append(
            f"Beside it lies {leftovers[0]}, left by an export that was killed. Unless one is "
            "running now, delete it."
        )
    return found
