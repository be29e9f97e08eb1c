"""The copy of the configuration that a run keeps, `config.toml`: as the file was, less secrets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from omnigen_pipe.config import WebhookConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What stands for a webhook's address in a run's copy of the configuration.
_HIDDEN = "https://hidden.invalid"
#: TOML's strings and comments; outside of strings there are no quotes, and `#` begins a comment.
_STRING_OR_COMMENT = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|"(?:\\.|[^"\\\n])*"|'''
    r"""'''.*?'{3,5}|'[^'\n]*'|"""
    r"(?P<comment>#[^\n]*)",
    re.DOTALL,
)
_NO_COMMENT = "# (not copied: it may hold an address)"
_NO_COPY = "# Not copied: a webhook's address is written in a way that could not be hidden.\n"


def without_addresses(text: str, webhooks: Sequence[WebhookConfig]) -> str:
    """A configuration file's `text` without the addresses of its webhooks, which are secrets, and
    without comments that may hold one: it may have been taken out, and still be somebody's secret.

    Everything else is as it was; where that cannot be had, a comment says so in place of it all.
    """
    secrets = [hook.url.get_secret_value() for hook in webhooks if hook.url is not None]
    secrets = sorted(filter(None, secrets), key=len, reverse=True)

    def copied(found: re.Match[str]) -> str:
        token = found[0]
        if found["comment"] is not None:
            may_be_one = "/" in token or "url" in token.lower()
            return _NO_COMMENT if may_be_one else token
        value = tomllib.loads(f"value = {token}")["value"]
        hidden = _hidden(value, secrets)
        if hidden == value:
            return token
        return json.dumps(hidden, ensure_ascii=False).replace("\x7f", "\\u007f")

    try:
        copy = _STRING_OR_COMMENT.sub(copied, text)
        as_meant = tomllib.loads(copy) == _hidden(tomllib.loads(text), secrets)
    except (ValueError, RecursionError):  # of text that is no TOML, or not any more
        return _NO_COPY
    return copy if as_meant and not any(secret in copy for secret in secrets) else _NO_COPY


def _hidden(value: Any, secrets: Sequence[str]) -> Any:
    """A value as TOML has it, with what hides them in place of `secrets` in its strings."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _HIDDEN)
        return value
    if isinstance(value, list):
        return [_hidden(each, secrets) for each in value]
    if isinstance(value, dict):
        return {name: _hidden(each, secrets) for name, each in value.items()}
    return value
