"""The command line's table: every command that is written stands in it, and it sets the order."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from manifests.errors import UsageError
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


def _paths() -> list[tuple[str, str, str]]:
    """The command, the parameter and the option (empty for an argument) of every path."""
    group: Any = typer.main.get_command(cli.app)
    calls = {command.name: command.call for command in cli.COMMANDS}
    return [
        (name, param.name, param.opts[0] if param.opts[0].startswith("-") else "")
        for name, command in group.commands.items()
        for param in command.params
        if param.name in inspect.signature(calls[name]).parameters
        and "Path" in str(typing.get_type_hints(calls[name])[param.name])
    ]


@pytest.mark.parametrize(("command", "parameter", "option"), _paths())
def test_an_empty_path_is_refused_rather_than_taken_for_the_current_folder(
    command: str, parameter: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, [command, *([option] if option else []), ""])
    assert result.exit_code == 2
    assert "it is empty" in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_paths_of_every_kind_are_among_those_that_are_tried() -> None:
    assert {("generate", "output", "--output"), ("export", "adapter", "")} <= set(_paths())


def test_an_empty_folder_of_images_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["init", str(tmp_path / "new"), "--yes", "--images", ""])
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "new" / "omnigen-pipe.toml").exists()
