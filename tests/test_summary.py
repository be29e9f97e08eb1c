"""What a command prints at its end: one thing is said in the singular, and the JSON stays."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from omnigen_pipe.summary import Summary, show

ROOT = Path(__file__).resolve().parents[1]

#: Ends of words that are no plain plural in s: batches, boxes, entries, less, status, is, was.
_NOT_PLAIN = re.compile(r"(ie|s|sh|ch|x|z|u|i|wa|ha)s$")


def _names(path: Path) -> set[str]:
    """The names that `path` gives counts: keys of a summary's `counts`, given or set."""
    found: set[str] = set()

    def is_counts(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and ast.unparse(node).endswith("summary.counts")

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Summary":
            dicts = [word.value for word in node.keywords if word.arg == "counts"]
            keys = [key for one in dicts if isinstance(one, ast.Dict) for key in one.keys]
        elif isinstance(node, ast.Assign | ast.AugAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            keys = node.value.keys if any(is_counts(target) for target in targets) else []
        elif isinstance(node, ast.Subscript) and is_counts(node.value):
            keys = [node.slice]
        found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return found


def _all_names() -> list[str]:
    paths = [path for room in ("omnigen_pipe", "stages") for path in (ROOT / room).rglob("*.py")]
    return sorted(set[str]().union(*map(_names, paths)))


def _line(counts: dict[str, int], capsys: pytest.CaptureFixture[str]) -> str:
    show(Summary("stage", changed=True, counts=counts))
    return capsys.readouterr().out.strip()


def test_the_names_of_counts_are_found() -> None:
    """Each of these is given in another way."""
    expected = {"samples", "steps now", "bytes written", "files opened", "pictures", "marked"}
    assert expected <= set(_all_names())


@pytest.mark.parametrize("name", _all_names())
def test_the_plurals_in_the_name_of_a_count_are_plain(name: str) -> None:
    """The rule of the singular is right for these only: another name needs another rule."""
    assert not any(_NOT_PLAIN.search(word) for word in name.split())


@pytest.mark.parametrize("name", _all_names())
@pytest.mark.parametrize("number", [0, 2, 11, 1001])
def test_other_numbers_leave_the_name_as_it_is(
    name: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _line({name: number}, capsys) == f"stage: {number:,} {name}"


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("pictures", "picture"),
        ("damaged latents", "damaged latent"),
        ("files opened", "file opened"),
        ("unfinished files deleted", "unfinished file deleted"),
        ("bytes freed", "byte freed"),
        ("steps now", "step now"),
        ("rejected", "rejected"),
        ("already there", "already there"),
        ("changed since discover", "changed since discover"),
        ("other workers'", "other workers'"),
    ],
)
def test_one_is_singular(name: str, one: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in _all_names()
    assert _line({name: 1}, capsys) == f"stage: 1 {one}"


def test_the_json_keeps_its_keys() -> None:
    assert Summary("stage", True, counts={"pictures": 1}).as_json()["counts"] == {"pictures": 1}
