"""The tutorial's commands, run as they stand, in an empty folder: what it shows is what they say.

Numbers differ between machines, so they are left out of the comparison.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from writable_hub import TOKEN, writable_hub

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def blocks() -> list[tuple[str, str]]:
    """The page's blocks of code, each with its kind: `sh`, `toml` or `text`."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_numbers(line: str) -> str:
    """What stays the same on every machine."""
    return " ".join(re.sub(r"[\d.,]*\d", "N", line).split())


def walk(folder: Path, environment: dict[str, str]) -> None:
    """Do what the page says, beginning in `folder`, and check what it shows."""
    here, output = folder, ""
    for kind, text in blocks():
        if kind == "toml":
            (here / "omnigen-pipe.toml").write_text(text, encoding="utf-8")
        elif kind == "sh":
            done = subprocess.run(
                ["bash", "-ec", f'{text}\npwd > "$WHERE"'],
                cwd=here,
                env={**environment, "WHERE": str(folder / "where")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            print(text, done.stdout, sep="\n")
            assert done.returncode == 0, text
            here = Path((folder / "where").read_text().strip())
            output = done.stdout
        else:
            assert kind == "text", kind
            said = [without_numbers(line) for line in output.splitlines()]
            for line in filter(str.strip, text.splitlines()):
                assert line == "…" or without_numbers(line) in said, line


@pytest.mark.slow
def test_the_tutorial_from_an_empty_folder(tmp_path: Path) -> None:
    with writable_hub() as hub:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the stub speaks the older protocol only
            "COLUMNS": "100",
        }
        walk(tmp_path, environment)
    workspace = tmp_path / "zorps"
    for name in ("inspect.html", "runs/default/inspect.html", "grid.png"):
        assert (workspace / name).is_file(), name
    assert len(list((workspace / "runs/default/validation").glob("step-*/*.png"))) == 4
    assert {"README.md", "adapter.safetensors", "lycoris_config.json"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert "`zorp`" in card
    assert "--model embedded" in card
