"""The house: imports point down, and the command line starts without what is heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path for room in ("manifests", "omnigen_pipe", "stages") for path in (ROOT / room).rglob("*.py")
)

#: From the roof to the ground. A module may import from its own floor's room and from below.
FLOORS = [
    {"omnigen_pipe.cli"},
    {"stages"},
    {"omnigen_pipe.demo", "omnigen_pipe.memory", "omnigen_pipe.report", "omnigen_pipe.starting"},
    {"omnigen_pipe.embedded"},
    {"omnigen_pipe.export", "omnigen_pipe.maintenance", "omnigen_pipe.training"},
    {"omnigen_pipe.runs", "omnigen_pipe.sampling"},
    {"omnigen_pipe.latents", "omnigen_pipe.model"},
    {"omnigen_pipe.images"},
    {"omnigen_pipe.prompts"},
    {"omnigen_pipe.device", "omnigen_pipe.model_files"},
    {"omnigen_pipe.weights"},
    {"omnigen_pipe.summary", "omnigen_pipe.webhooks", "omnigen_pipe.workspace"},
    {
        "omnigen_pipe.config",
        "omnigen_pipe.hub",
        "omnigen_pipe.mtimes",
        "omnigen_pipe.progress",
        "omnigen_pipe.quiet",
        "omnigen_pipe.settings",
        "omnigen_pipe.stop",
        "omnigen_pipe.world",
    },
    {"omnigen_pipe.ahead", "omnigen_pipe.cores", "omnigen_pipe.events", "omnigen_pipe.precisions"},
    {"manifests"},
]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """Every module of ours that `path` names, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from omnigen_pipe import model_files` names a module, too.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {_module(p) for p in CODE}
            found |= (inner & modules) or {node.module}
    return {name for name in found if name.split(".")[0] in {"manifests", "omnigen_pipe", "stages"}}


def _floor(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    raise AssertionError(f"{module} stands on no floor: give it one in FLOORS")


def _room(module: str) -> str:
    return next(
        room
        for rooms in FLOORS
        for room in rooms
        if module == room or module.startswith(room + ".")
    )


@pytest.mark.parametrize("path", CODE, ids=_module)
def test_imports_point_down(path: Path) -> None:
    module = _module(path)
    if module == "omnigen_pipe":
        return
    for imported in _imports(path):
        if imported == "omnigen_pipe":
            continue
        down = _floor(imported) > _floor(module)
        assert down or _room(imported) == _room(module), f"{module} imports {imported}"


@pytest.mark.parametrize(
    "path", [p for p in CODE if p.parent.name == "stages" and p.stem != "__init__"], ids=_module
)
def test_no_stage_imports_another(path: Path) -> None:
    assert not any(name.startswith("stages") for name in _imports(path))


def test_only_the_command_line_names_the_stages() -> None:
    naming = {
        _room(_module(p)) for p in CODE if any(n.split(".")[0] == "stages" for n in _imports(p))
    }
    assert naming == {"omnigen_pipe.cli"}


def test_no_two_modules_import_each_other() -> None:
    graph = {_module(path): _imports(path) for path in CODE}
    circles = [
        (one, other)
        for one, imported in graph.items()
        for other in imported
        if one < other and one in graph.get(other, set()) and other != one
    ]
    assert circles == []


@pytest.mark.parametrize("heavy", ["torch", "diffusers", "transformers", "duckdb", "pyarrow"])
def test_help_starts_without_what_is_heavy(heavy: str) -> None:
    code = (
        "import sys; sys.argv = ['omnigen-pipe', '--help']\n"
        "from omnigen_pipe.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"assert {heavy!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
