"""The docs: reference pages are current, commands and options are there, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from omnigen_pipe.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_pages_are_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("name", sorted(_commands()))
def test_every_command_and_option_has_a_help_text_and_an_example(name: str) -> None:
    command = _commands()[name]
    assert command.help
    assert f"omnigen-pipe {name}" in (command.epilog or "")
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    "name", ["discover", "bucket", "encode-vae", "tokenize", "train", "init", "verify"]
)
def test_every_stage_has_a_page(name: str) -> None:
    assert f"omnigen-pipe {name}" in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_commands(page: Path) -> None:
    """Every line of code that starts with our name parses: the command is known, and so are its
    options."""
    if page.name == "commands.md":
        return  # made from the commands themselves, with their usage in brackets
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^ +(?:[A-Z_]+=\S+ )*omnigen-pipe ([a-z].*)$", text, re.MULTILINE)
    lines += re.findall(r"^omnigen-pipe (.+)$", blocks.replace("\\\n", " "), re.MULTILINE)
    if page.name == "README.md":
        assert len(lines) >= 3
    group: Any = typer.main.get_command(app)
    parent = group.make_context("omnigen-pipe", ["run"], resilient_parsing=True)
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        _commands()[name].make_context(name, arguments, parent=parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_docs_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        text = page.read_text(encoding="utf-8")
        waiting += [
            (page.parent / target).resolve()
            for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text)
            if (page.parent / target).exists()
        ]
    assert set(PAGES) <= reached


@pytest.mark.slow
def test_the_pictures_of_the_loss_can_be_drawn(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "loss_plots.py"), "--steps", "60"]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True, capture_output=True)
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert drawn.keys() == {path.name for path in (ROOT / "docs" / "images").glob("loss-*.png")}
    assert all(size < 200 * 1024 for size in drawn.values())
