"""What a manifest was made with, written beside it, and how two of these differ.

A manifest carries its settings as readable JSON rather than as a key alone: so it can be said
which one changed, and from what to what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Settings by name; those of datasets lie one level deeper, by id, under this name.
Settings = Mapping[str, Any]
DATASETS = "datasets"

#: So many phrases stand in one line of a message.
_SHOWN = 5

#: Longer values, such as hashes, tell a person nothing beside that they differ.
_READABLE = 60


def as_text(settings: Settings) -> str:
    """Settings as a manifest's metadata carries them: equal settings give equal texts."""
    return json.dumps(settings, sort_keys=True)


def from_text(text: str) -> dict[str, Any]:
    """The settings in a manifest's metadata; none where it has none, or in another form."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def changes(then: Settings, now: Settings) -> list[str]:
    """What differs, a phrase each, such as `crop_style of dataset cats: center → random`."""
    # Through JSON, so that a tuple is the list that it was written as.
    then, now = (json.loads(json.dumps(settings)) for settings in (then, now))
    phrases = _differences({**then, DATASETS: None}, {**now, DATASETS: None}, "")
    before, after = then.get(DATASETS, {}), now.get(DATASETS, {})
    for dataset in sorted({*before, *after}):
        if dataset not in before:
            phrases.append(f"dataset {dataset} is new")
        elif dataset not in after:
            phrases.append(f"dataset {dataset} is gone or disabled")
        else:
            where = f" of dataset {dataset}"
            phrases += _differences(before[dataset], after[dataset], where)
    return phrases


def listed(phrases: list[str]) -> str:
    """The first few phrases in one line, and how many more there are."""
    more = len(phrases) - _SHOWN
    return "; ".join([*phrases[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _differences(then: Settings, now: Settings, where: str) -> list[str]:
    phrases = []
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before != after:
            shown = f"{_shown(before)} → {_shown(after)}"
            readable = len(shown) <= _READABLE
            phrases.append(f"{name}{where}: {shown}" if readable else f"{name}{where} changed")
    return phrases


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)
