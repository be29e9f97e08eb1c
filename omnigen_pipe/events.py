"""Events: what happens in a training, told to whoever listens.

Pure: an event is a name, fields that JSON can say, and files. Who listens (webhooks, the pushing of
checkpoints) is put together elsewhere, and what sends events knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EventName = Literal[
    "start",
    "step",
    "evaluation",
    "checkpoint",
    "preview",
    "validation",
    "end",
    "error",
]


@dataclass(frozen=True)
class EventFile:
    """A file that an event carries: its name, content, and media type."""

    name: str
    content: bytes
    media_type: str = "image/png"


@dataclass(frozen=True)
class Event:
    """Something that happened; `fields` hold what JSON can say, without NaN and infinities."""

    name: EventName
    fields: Mapping[str, Any]
    files: tuple[EventFile, ...] = ()


#: Is told of an event. It must return at once, and raise nothing: training waits for it.
Listener = Callable[[Event], None]


@dataclass
class Events:
    """Passes events on to all `listeners`, in their order; with none, nothing happens."""

    listeners: list[Listener] = field(default_factory=list)

    def send(self, name: EventName, *files: EventFile, **fields: Any) -> None:
        """Tell all listeners; a number that is not finite becomes None."""
        if not self.listeners:
            return
        event = Event(name, {key: _finite(value) for key, value in fields.items()}, files)
        for listener in self.listeners:
            listener(event)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
