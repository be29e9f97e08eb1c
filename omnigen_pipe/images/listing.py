"""Lists: a JSONL, CSV or Parquet file that names images and, if asked, their captions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from manifests.errors import UsageError
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidate, Candidates, asked, escaped
from omnigen_pipe.images.captions import LIST_STRATEGIES, from_value
from omnigen_pipe.workspace import Workspace

#: What a list is, by its extension.
LIST_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


class Listed(NamedTuple):
    """What a list says about one image: its captions, or why it gives none."""

    texts: tuple[str, ...]
    reason: str | None


@dataclass
class Listing:
    """A list file: captions by path from the dataset's root.

    `outside` holds, by their text, the paths that lead outside the root or nowhere, with the
    reason. `size` (bytes) and `mtime_ns` are the list file's.
    """

    size: int
    mtime_ns: int
    rows: dict[str, Listed] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)


def list_path(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Path:
    """The list file: from the workspace or, where there is none, from the dataset's root."""
    assert dataset.list_file is not None  # the configuration demands one for every list
    places = [workspace.path(dataset.list_file), root / dataset.list_file]
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"dataset `{dataset.id}`: there is no list_file {dataset.list_file}, neither at "
        f"{places[0]} nor at {places[1]}."
    )


def read_listing(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Listing:
    """The rows of `dataset.list_file`, with several rows for one path merged in their order.

    Raises `UsageError` for a list that cannot be read, or lacks a column that is asked for.
    """
    path = list_path(workspace, dataset, root)
    where = f"dataset `{dataset.id}`: {path}"
    by_name = LIST_KINDS.get(path.suffix.lower())
    strategy = dataset.caption_strategy
    kind = strategy if strategy in LIST_STRATEGIES else by_name
    if kind is None:
        raise UsageError(f"{where} must end in {', '.join(LIST_KINDS)}.")
    if by_name is not None and by_name != kind:
        raise UsageError(f'{where} is no {kind}, but caption_strategy is "{strategy}".')
    caption_column = dataset.caption_column if strategy in LIST_STRATEGIES else None
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    roots = (os.path.abspath(root), os.path.realpath(root))
    try:
        facts = path.stat()
        listing = Listing(facts.st_size, facts.st_mtime_ns)
        for number, text, value, fault in readers[kind](
            where, path, dataset.path_column, caption_column
        ):
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"{where}: row {number} has no path in `{dataset.path_column}`. Correct it "
                    "or delete the row."
                )
            texts, reason = from_value(value) if caption_column else ([], None)
            name, outside = _inside(text, roots)
            if outside is not None:
                listing.outside[name] = outside
            else:
                before = listing.rows.get(name, Listed((), None))
                merged = (*before.texts, *(() if fault else texts))
                listing.rows[name] = Listed(merged, None if merged else fault or reason)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text: {error}") from error
    return listing


#: Row number, path, caption, and what is wrong with the row as a whole.
_Row = tuple[int, object, object, str | None]


def _no_column(where: str, column: str, columns: Iterable[object]) -> UsageError:
    known = ", ".join(f"`{c}`" for c in columns) or "none"
    return UsageError(
        f"{where} has no column `{column}`; its columns are {known}. Set path_column and "
        "caption_column."
    )


def _jsonl_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    keys: dict[str, None] = {}
    number = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(f"{where}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{where}: line {number} is not a JSON object ({{…}}).")
            keys.update(dict.fromkeys(row))
            if column not in row and column not in keys:
                raise _no_column(where, column, keys)
            yield number, row.get(column), row.get(caption) if caption else None, None
    if keys and caption is not None and caption not in keys:
        raise _no_column(where, caption, keys)


def _csv_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            columns = reader.fieldnames or ()
            for wanted in (column, caption):
                if wanted is not None and wanted not in columns:
                    raise _no_column(where, wanted, columns)
            for row in reader:
                fault = None
                if None in row:
                    fault = "no caption: the list's row has more fields than its header"
                value = row[caption] if caption else None
                yield reader.line_num, row[column], value, fault
        except csv.Error as error:
            raise UsageError(f"{where}: line {reader.reader.line_num}: {error}") from error


def _parquet_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for wanted in (column, caption):
                if wanted is not None and wanted not in table.schema_arrow.names:
                    raise _no_column(where, wanted, table.schema_arrow.names)
            wanted_columns = [column] if caption is None else list(dict.fromkeys((column, caption)))
            number = 0
            for batch in table.iter_batches(columns=wanted_columns):
                paths = batch.column(column).to_pylist()
                values = batch.column(caption).to_pylist() if caption else [None] * len(paths)
                for text, value in zip(paths, values, strict=True):
                    number += 1
                    yield number, text, value, None
    except pa.ArrowException as error:
        raise UsageError(f"{where} is not a readable Parquet file: {error}") from error


def _inside(text: str, roots: tuple[str, ...]) -> tuple[str, str | None]:
    """The path that `text` names from the root, or as written and why it leads nowhere there.

    Only the text is judged: a link inside the root may lead outside, as in a walk.
    """
    shown = escaped(text)
    if shown != text:
        return shown, "name is not UTF-8: rename the file"
    path = os.path.normpath(text)
    for root in roots:
        if path.startswith(root.rstrip("/") + "/"):
            path = path[len(root.rstrip("/")) + 1 :]
            break
    if os.path.isabs(path) or path == ".." or path.startswith("../"):
        return path, "outside the dataset: the list's path leaves instance_data_dir"
    return path, None


def listed_candidates(root: Path, listing: Listing) -> Candidates:
    """What `listing` names under `root`, sorted by path."""
    absent = "not there: the list names a file that does not exist"
    found = [asked(path, os.path.join(root, path), absent) for path in listing.rows]
    found += [Candidate(path, "", None, None, why) for path, why in listing.outside.items()]
    return Candidates(sorted(found, key=lambda candidate: candidate.path))
