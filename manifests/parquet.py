"""One manifest file: written through staging, read with its metadata checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.publish import publishing, unfinished
from manifests.schema import SCHEMA_VERSION, Manifest

_PREFIX = "omnigen_pipe."

#: Rows per row group: what a reader has to hold at once, and what two threads share out.
ROW_GROUP = 100_000


def tool_version() -> str:
    """The installed version of omnigen-pipe."""
    try:
        return version("omnigen-pipe")
    except PackageNotFoundError:
        return "unknown"


def write(table: pa.Table, manifest: Manifest, final: Path, staging: Path, **metadata: str) -> Path:
    """Publish `table` as the manifest file `final`, with `metadata` beside the standard keys.

    Extra columns are dropped and the rest cast to the manifest's schema; a missing column or a
    value that does not fit raises `pyarrow.ArrowInvalid` or `KeyError`; a disk that is full or
    not writable, `WriteError`.
    """
    with writer(manifest, final, staging, **metadata) as add:
        add(table)
    return final


@contextmanager
def writer(
    manifest: Manifest, final: Path, staging: Path, **metadata: str
) -> Iterator[Callable[[pa.Table], None]]:
    """Publish, at the end, the rows that were given to the value in portions; see `write`.

    Where it ends by an exception nothing is published.
    """
    with publishing(staging, final) as path, _filling(path, manifest, metadata) as add:
        yield add


def stage(
    tables: Iterable[pa.Table], manifest: Manifest, final: Path, staging: Path, **metadata: str
) -> Path:
    """Write the rows of `tables` as `writer` does, without publishing them; their file."""
    with unfinished(staging, final) as path, _filling(path, manifest, metadata) as add:
        for table in tables:
            add(table)
    return path


def fitted(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The manifest's columns of `table`, in its order and with its types; raises as `write`."""
    return table.select(manifest.schema.names).cast(manifest.schema)


@contextmanager
def _filling(
    path: Path, manifest: Manifest, metadata: Mapping[str, str]
) -> Iterator[Callable[[pa.Table], None]]:
    """Write the rows that are given to the value into the new file `path`."""
    entries = {
        "schema_version": str(SCHEMA_VERSION),
        "stage": manifest.stage,
        "manifest": manifest.name,
        "tool_version": tool_version(),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **metadata,
    }
    schema = manifest.schema.with_metadata({_PREFIX + k: v for k, v in entries.items()})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as file:

        def add(table: pa.Table) -> None:
            fitting = fitted(table, manifest).replace_schema_metadata(schema.metadata)
            file.write_table(fitting, row_group_size=ROW_GROUP)

        yield add


def read_metadata(path: Path, manifest: Manifest) -> dict[str, str] | None:
    """The metadata of a manifest file, without its prefix; None for a file that is not ours.

    Raises `ManifestError` for a file that a newer version wrote, or that is another manifest.
    `FileNotFoundError` passes through.
    """
    try:
        raw = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    except OSError as error:
        if error.errno is not None:
            raise
        return None  # Arrow's word for a footer that makes no sense
    try:
        found = {
            name.decode().removeprefix(_PREFIX): value.decode()
            for name, value in raw.items()
            if name.startswith(_PREFIX.encode())
        }
        schema_version = int(found["schema_version"])
    except (KeyError, ValueError):
        return None  # foreign, or our words with flipped bits
    if schema_version > SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema version {schema_version}, and this omnigen-pipe "
            f"({tool_version()}) reads up to {SCHEMA_VERSION}. Upgrade omnigen-pipe to at least "
            f"{found.get('tool_version', 'the version that wrote it')}."
        )
    if found.get("manifest") != manifest.name:
        raise ManifestError(
            f"{path} holds the manifest `{found.get('manifest')}`, but lies where "
            f"`{manifest.name}` is expected. Move it away."
        )
    return found


def read(path: Path, manifest: Manifest) -> pa.Table:
    """The rows of a manifest file, with the schema's columns in the schema's order.

    Columns that a later version added are null where an earlier one wrote the file.
    """
    return _completed(pq.read_table(path), manifest)


def equal(path: Path, other: Path, manifest: Manifest) -> bool:
    """Whether two manifest files hold the same rows in the same order; holds few of them at once.

    Files may differ in how their rows are grouped, in their metadata, and in columns that only
    one of them has, where the other one's are null.
    """
    ours, theirs = (_rows(p, manifest) for p in (path, other))
    mine, yours = next(ours, None), next(theirs, None)
    while mine is not None and yours is not None:
        number = min(mine.num_rows, yours.num_rows)
        if not mine.slice(0, number).equals(yours.slice(0, number)):
            return False
        mine = mine.slice(number) if number < mine.num_rows else next(ours, None)
        yours = yours.slice(number) if number < yours.num_rows else next(theirs, None)
    return mine is yours is None


def _rows(path: Path, manifest: Manifest) -> Iterator[pa.Table]:
    """The rows of a manifest file in tables of at most `ROW_GROUP` rows, none of them empty."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROW_GROUP):
            if batch.num_rows:
                yield _completed(pa.Table.from_batches([batch]), manifest)


def _completed(table: pa.Table, manifest: Manifest) -> pa.Table:
    """`table` with the columns of `manifest` alone; those that it lacks are null."""
    for field in manifest.schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(manifest.schema.names).cast(manifest.schema)


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a manifest file; None where nothing is found.

    Reads it all. Pages carry checksums, so that hardly a flipped bit goes unnoticed.
    """
    try:
        pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        return str(error).splitlines()[0]
    return None


def row_count(path: Path) -> int:
    """The number of rows of a manifest file."""
    return int(pq.read_metadata(path).num_rows)
