"""A command: the function that does it, its name, and the examples under its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """What typer needs to know of one command; `call`'s docstring and parameters are its help."""

    name: str
    call: Callable[..., None]
    epilog: str


def command(name: str, *, epilog: str) -> Callable[[Callable[..., None]], Command]:
    """Make the decorated function the command `name`.

    typer reads the function's annotations when it runs: a module must import what they name,
    outside of `TYPE_CHECKING`.
    """
    return lambda call: Command(name, call, epilog)
