"""The command line's table: every command that is written stands in it, and it sets the order."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import typer

from omnigen_pipe import cli
from omnigen_pipe.cli.command import Command


def test_every_command_that_a_module_defines_is_registered_once() -> None:
    """One that was written and left out of the table would be missed by no other test."""
    names = [found.name for found in pkgutil.iter_modules(cli.__path__)]
    modules = [importlib.import_module(f"{cli.__name__}.{name}") for name in names]
    written = [
        value for module in modules for value in vars(module).values() if isinstance(value, Command)
    ]
    assert written
    assert sorted(c.name for c in written) == sorted(c.name for c in cli.COMMANDS)
    assert all(any(one is command for command in cli.COMMANDS) for one in written)


def test_the_help_lists_the_commands_in_the_order_of_the_table() -> None:
    group: Any = typer.main.get_command(cli.app)
    assert list(group.commands) == [command.name for command in cli.COMMANDS]
