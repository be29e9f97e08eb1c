"""The page: one HTML file that asks nothing of any other, written whole or not at all.

Whatever comes from files (captions, paths, names) is escaped by Jinja and cut to a length. A
policy in the page forbids it to load anything, should something slip through.
"""

from __future__ import annotations

import os
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from manifests.errors import UsageError
from manifests.parquet import tool_version
from manifests.publish import publishing
from omnigen_pipe.model_files import Model
from omnigen_pipe.report.charts import number
from omnigen_pipe.workspace import Workspace

#: The pictures of a page, and the text of contact sheets, weigh at most so many bytes, in the form
#: that they stand in it…
MOST_PICTURE_BYTES = 8 * 2**20
#: …and the page at most so many: everything else in it is bounded in number and in length.
MOST_BYTES = 12 * 2**20

#: What a page says of its maker; by it an earlier report is known, which may be replaced.
MARK = '<meta name="generator" content="omnigen-pipe inspect">'
_HEAD_BYTES = 1024


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("omnigen_pipe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = cut
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["number"] = number
    return environment


def cut(text: object, most: int) -> str:
    """`text` with at most `most` characters: its middle is left out, and what no page may hold."""
    shown = str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "�")
    if len(shown) <= most:
        return shown
    half = (most - 1) // 2
    return f"{shown[: most - 1 - half]}…{shown[len(shown) - half :]}"


def render(template: str, **values: Any) -> str:
    """The text of `template`, a file of `templates/`."""
    return _environment().get_template(template).render(mark=MARK, **values)


def render_report(template: str, workspace: Workspace, **values: Any) -> str:
    """The page of `template` about something in `workspace`, with what every report says."""
    return render(
        template,
        made=datetime.now(timezone.utc),
        version=tool_version(),
        model=Model.of(workspace).label,
        **values,
    )


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `UsageError` where a page cannot be written to `output`.

    An earlier report is replaced; anything else only with `overwrite`.
    """
    if output.is_dir():
        raise UsageError(
            f"--output {output} is a folder. Name a file, such as {output}/inspect.html."
        )
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}.")
    if output.exists() and not overwrite and not _is_ours(output):
        raise UsageError(
            f"{output} is there already, and no report of `inspect`. Name another file with "
            "--output, or use --overwrite."
        )


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def publish(page: str, output: Path, staging: Path) -> int:
    """Write `page` to `output`, whole or not at all; returns its bytes.

    Raises `WriteError` where the disk is full or not writable.
    """
    data = page.encode("utf-8")
    # A rename must stay on one file system; beside the file there is no other.
    near = (
        staging.parent.exists() and os.stat(staging.parent).st_dev == os.stat(output.parent).st_dev
    )
    with publishing(staging if near else output.parent, output) as unfinished:
        unfinished.write_bytes(data)
    return len(data)
