"""Which prompts are wanted besides captions, and what a bad prompt library says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.prompts.library import (
    dropout_prompt,
    negative_prompt,
    prompts_besides_captions,
    validation_prompts,
)
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.workspace import Workspace


def workspace(root: Path, **tables: Any) -> Workspace:
    return Workspace(root, parse(tables, "test"))


def test_dropout_prompts_are_always_wanted(tmp_path: Path) -> None:
    assert prompts_besides_captions(workspace(tmp_path)) == ["<cfg>", "", DIFFUSERS_NEGATIVE_PROMPT]


@pytest.mark.parametrize(
    ("choice", "expected"), [("<cfg>", "<cfg>"), ("empty", ""), ("negative", "bad")]
)
def test_the_configured_dropout_prompt(choice: str, expected: str) -> None:
    config = parse(
        {
            "train": {"caption_dropout_prompt": choice},
            "validation": {"validation_negative_prompt": "bad"},
        },
        "test",
    )
    assert dropout_prompt(config) == expected
    assert negative_prompt(config) == "bad"


def test_an_empty_negative_prompt_is_kept() -> None:
    assert negative_prompt(parse({"validation": {"validation_negative_prompt": ""}}, "test")) == ""


def test_validation_prompts_and_library_come_by_nickname(tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text('{"cat": "a cat", "chat": "un chat à côté"}', "utf-8")
    opened = workspace(
        tmp_path,
        validation={"validation_prompt": "a cat", "user_prompt_library": "library.json"},
    )
    assert validation_prompts(opened) == {
        "validation": "a cat",
        "cat": "a cat",
        "chat": "un chat à côté",
    }
    assert prompts_besides_captions(opened)[3:] == ["a cat", "un chat à côté"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ('{"cat": ', "cannot be used"),
        ('["a cat"]', "holds a list"),
        ('{"cat": 3}', "`cat` is 3"),
        ('{"cat": "a", "cat": "b"}', "`cat` occurs twice"),
        ('{"validation": "a"}', "another nickname"),
    ],
)
def test_a_bad_library_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "library.json").write_text(content)
    opened = workspace(
        tmp_path, validation={"validation_prompt": "v", "user_prompt_library": "library.json"}
    )
    with pytest.raises(UsageError, match=message) as caught:
        validation_prompts(opened)
    assert "library.json" in str(caught.value)


def test_a_library_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text(json.dumps({"cat": "a cat"}), "utf-8-sig")
    opened = workspace(tmp_path, validation={"user_prompt_library": "library.json"})
    assert validation_prompts(opened) == {"cat": "a cat"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (r'{"a": "x\ud800y"}', r"the prompt of `a`.*character 2 is \\ud800"),
        (r'{"b\udcff": "x"}', r'the nickname "b\\udcff".*character 2'),
    ],
)
def test_half_of_a_pair_in_the_library_is_refused(tmp_path: Path, content: str, named: str) -> None:
    """It could be neither tokenised nor written."""
    (tmp_path / "library.json").write_text(content, "utf-8")
    opened = workspace(tmp_path, validation={"user_prompt_library": "library.json"})
    with pytest.raises(UsageError, match=f"user_prompt_library.*{named}") as refused:
        validation_prompts(opened)
    str(refused.value).encode()


def test_a_whole_pair_in_the_library_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text(r'{"a": "\ud83d\ude42"}', "utf-8")
    opened = workspace(tmp_path, validation={"user_prompt_library": "library.json"})
    assert validation_prompts(opened) == {"a": "\U0001f642"}
