"""Tables of captions that lie in a folder of images, with the columns that they keep them in.

Only the folder itself is looked into, not those below it, and only columns of usual names are
known. What discover would read is decided by its own reader, so a table that is proposed works.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe.config import Config, DatasetConfig
from omnigen_pipe.images.candidates import escaped
from omnigen_pipe.images.listing import LIST_KINDS, read_listing
from omnigen_pipe.workspace import Workspace

#: Usual names of the columns, the likeliest first. `file_name` is that of the hub's folders.
PATH_COLUMNS = ("path", "file_name", "filename", "file", "file_path", "filepath", "image", "key")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")

#: Tables looked into, and the largest of them (bytes): each is read as a whole.
MOST_TABLES = 8
_ENDINGS = tuple(LIST_KINDS)
_LARGEST = 256 * 2**20


@dataclass(frozen=True)
class Table:
    """A table with captions: its kind as `caption_strategy` has it, and its columns.

    `captioned` counts the images, of those looked for, to which it gives a caption.
    """

    path: Path
    kind: str
    path_column: str
    caption_column: str
    captioned: int


def find_tables(folder: Path, images: Sequence[str]) -> tuple[list[Table], list[str]]:
    """The tables in `folder` that have captions, and sentences on those that cannot be used.

    `images` are the paths, from `folder`, to look for in them.
    """
    tables: list[Table] = []
    notes: list[str] = []
    # By their names first: there may be a million others.
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(_ENDINGS))
    found = [
        folder / name
        for name in names
        if not name.startswith(".")
        and escaped(name) == name  # else no configuration could name it
        and (folder / name).is_file()
    ]
    for path in found[:MOST_TABLES]:
        table = _table(folder, path, images)
        if isinstance(table, str):
            notes.append(f"{path.name} is not used: {table}")
        elif table is not None:
            tables.append(table)
    if len(found) > MOST_TABLES:
        notes.append(f"{len(found) - MOST_TABLES:,} more tables were not looked into.")
    return tables, notes


def _table(folder: Path, path: Path, images: Sequence[str]) -> Table | str | None:
    """The table at `path`, or why it cannot be used; None where it is no table at all."""
    kind = LIST_KINDS[path.suffix.lower()]
    try:
        if path.stat().st_size > _LARGEST:
            return f"it is larger than {_LARGEST // 2**20} MiB. Set list_file to use it."
        columns = _columns(path, kind)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if path.suffix.lower() == ".json":
            return None  # settings of some program, most likely
        return f"{' '.join(str(error).split()) or type(error).__name__}."
    if columns is None:
        return None
    where = next((name for name in PATH_COLUMNS if name in columns), None)
    what = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if where is None or what is None:
        if path.suffix.lower() == ".json":
            return None
        listed = ", ".join(f"`{name}`" for name in columns[:8])
        missing = "path" if where is None else "caption"
        return f"none of its columns ({listed}) is known to be the {missing}."
    dataset = DatasetConfig.model_validate(
        {
            "id": "images",
            "instance_data_dir": str(folder),
            "caption_strategy": kind,
            "list_file": str(path),
            "path_column": where,
            "caption_column": what,
        }
    )
    try:
        rows = read_listing(Workspace(folder, Config()), dataset, folder).rows
    except UsageError as error:
        return str(error).removeprefix(f"dataset `images`: {path}").lstrip(": ")
    captioned = sum(image in rows and bool(rows[image].texts) for image in images)
    return Table(path, kind, where, what, captioned)


def _columns(path: Path, kind: str) -> list[str] | None:
    """The columns that the table begins with; None where it is of another form or empty."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return [str(name) for name in pq.read_schema(path).names]
        except pa.ArrowException as error:
            raise ValueError(f"it is not a readable Parquet file: {error}") from error
    with path.open(encoding="utf-8-sig", newline="") as handle:
        if kind == "csv":
            return next(
                csv.reader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ","), None
            )
        for line in handle:
            if line.strip():
                row = json.loads(line)
                return list(row) if isinstance(row, dict) else None
    return None
