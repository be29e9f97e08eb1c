"""The copy of a configuration that a run keeps says what the file says, and holds no address."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from omnigen_pipe.config import WebhookConfig
from omnigen_pipe.runs.configuration_copy import without_addresses

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What stands for a webhook's address in a run's copy of the configuration.
HIDDEN = "https://hidden.invalid"


@pytest.mark.parametrize(
    "text",
    [
        '[[webhook]]\nurl = "https://a.test/s3cret"\n# was "https://a.test/s3cret"\n',
        "webhook = [{ url = 'https://a.test/s3cret' }]\n",
        '[[webhook]]\nurl = "https://a.test/\\u00733cret"\n',
    ],
)
def test_a_copy_of_the_configuration_holds_no_address(text: str) -> None:
    hooks = [WebhookConfig(url=SecretStr("https://a.test/s3cret"))]
    kept = without_addresses(f"{text}[train]\n", hooks)
    assert "3cret" not in kept
    assert kept.startswith("# Not copied") or "[train]" in kept
    said = text.partition("# was")[0]
    assert without_addresses(text, []).startswith(said), "data that are no address stay"


@pytest.mark.parametrize(
    "comment",
    [
        '# url = "https://a.test/s3cret"',
        "  # https://a.test/s3cret",
        '# "url" = "https://a.test/s3cret"',
        "# url = a.test/s3cret",
        "# URL: a.test?s3cret",
        "#HTTPS://a.test/s3cret",
        "# Old: a.test/s3cret",
    ],
)
@pytest.mark.parametrize("beside", ["", 'url_env = "HOOK"', 'url_env = "HOOK"  '])
def test_an_address_in_a_comment_is_not_copied_either(comment: str, beside: str) -> None:
    kept = without_addresses(
        f'[[webhook]]\n{beside}{comment}\nform = "json" # a note\n',
        [WebhookConfig(url_env="HOOK")],
    )
    assert "s3cret" not in kept
    assert 'form = "json" # a note' in kept
    assert beside.strip() in kept


@pytest.mark.parametrize(
    "text",
    [
        'validation_prompt = "a sign # says url = foo"\n',
        "prompt = 'a # https://a.test/b'\n",
        'prompt = """\n# url = "foo\\""""\n',
        "prompt = '''\n# https://a.test''''\n",
        "words = [\"a#b/c\", 'd # e/f'] # a note\n",
        '"a key # with url = foo" = 1\n',
    ],
)
def test_what_looks_like_a_comment_in_a_string_is_copied(text: str) -> None:
    assert without_addresses(text, [WebhookConfig(url=SecretStr("https://s.test/s"))]) == text


def test_text_that_is_no_toml_is_not_copied() -> None:
    assert without_addresses('url = "https://a.test/s3cret\n', []).startswith("# Not copied")


_SECRET = "https://a.test/s3cret"
_pieces = st.lists(st.sampled_from([_SECRET, *"#'\"\\\n\x7f /é", "url = ", "a"]), max_size=8).map(
    "".join
)


@st.composite
def _lines(draw: st.DrawFn) -> str:
    """A line of TOML with a comment, and its string in one of the ways to write it."""
    value = draw(_pieces)
    ways = [json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")]
    if not re.search(r"[\x00-\x08\x0a-\x1f\x7f']", value):
        ways.append(f"'{value}'")
    if not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|'''|'$", value):
        ways.append(f"'''\n{value}'''")
    if not re.search(r'[\x00-\x08\x0b-\x1f\x7f\\]|"""|"$', value):
        ways.append(f'"""{value}"""')
    comment = re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", draw(_pieces))
    space = draw(st.sampled_from(["", " "]))
    return f"{draw(st.sampled_from(ways))}{space}#{comment}"


@given(st.lists(_lines(), max_size=4))
def test_a_copy_says_the_same_but_for_what_is_hidden(lines: list[str]) -> None:
    text = "".join(f"key{number} = {line}\n" for number, line in enumerate(lines))
    kept = without_addresses(text, [WebhookConfig(url=SecretStr(_SECRET))])
    assert "s3cret" not in kept
    meant = {name: value.replace(_SECRET, HIDDEN) for name, value in tomllib.loads(text).items()}
    assert tomllib.loads(kept) == meant
