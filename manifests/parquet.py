"""One manifest file: written through staging, read with its metadata checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.publish import publishing
from manifests.schema import SCHEMA_VERSION, Manifest

_PREFIX = "omnigen_pipe."

#: Rows per row group: what a reader has to hold at once, and what two threads share out.
ROW_GROUP = 50_000

#: Rows that Arrow decodes at once where a file is read in parts: with more it keeps far more.
_BATCH = 20_000


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
    entries = {
        "schema_version": str(SCHEMA_VERSION),
        "stage": manifest.stage,
        "manifest": manifest.name,
        "tool_version": tool_version(),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **metadata,
    }
    schema = manifest.schema.with_metadata({_PREFIX + k: v for k, v in entries.items()})
    with (
        publishing(staging, final) as path,
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as unfinished,
    ):

        def add(table: pa.Table) -> None:
            fitting = fitted(table, manifest).replace_schema_metadata(schema.metadata)
            unfinished.write_table(fitting, row_group_size=ROW_GROUP)

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

    Columns that a later version added are null where an earlier one wrote the file. Raises
    `ManifestError` where the file is damaged; `FileNotFoundError` passes through.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, manifest, str(error).splitlines()[0]) from error
    return _completed(table, manifest)


def damaged(path: Path, manifest: Manifest, fault: str) -> ManifestError:
    """The error for a manifest file with a `fault`, with what to do."""
    return ManifestError(
        f"{path} is damaged: {fault}. Move it away and run `omnigen-pipe {manifest.stage}`, which "
        "makes again what it held."
    )


def check_undamaged(paths: Iterable[Path], manifest: Manifest) -> None:
    """Read `paths` from end to end; raises `ManifestError` for one that is damaged.

    Questions are answered without it, since it reads every byte: ask where a wrong answer would
    last, or would delete something.
    """
    for path in paths:
        if fault := damage(path):
            raise damaged(path, manifest, fault)


def reader(file: pq.ParquetFile, manifest: Manifest) -> Callable[[int], pa.Table]:
    """A function that gives the next so many rows of a manifest file, fewer at its end.

    Columns are those of `read`. Hardly more rows are in memory than are asked for.
    """
    batches = file.iter_batches(_BATCH)
    waiting = manifest.empty()

    def take(number: int) -> pa.Table:
        nonlocal waiting
        while waiting.num_rows < number and (batch := next(batches, None)) is not None:
            more = _completed(pa.Table.from_batches([batch]), manifest)
            waiting = pa.concat_tables([waiting, more])
        taken, waiting = waiting.slice(0, number), waiting.slice(number)
        return taken

    return take


def fitted(table: pa.Table, manifest: Manifest) -> pa.Table:
    """`table` as it is written: without further columns, and of the schema's types."""
    return table.select(manifest.schema.names).cast(manifest.schema)


def _completed(table: pa.Table, manifest: Manifest) -> pa.Table:
    """`table` with null columns where it lacks one of `manifest`, fitted."""
    for field in manifest.schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return fitted(table, manifest)


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a manifest file; None where nothing is found.

    Reads it all. Pages carry checksums, so that hardly a flipped bit goes unnoticed.
    """
    try:
        pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        return str(error).splitlines()[0]
    return None


def row_count(path: Path) -> int:
    """The number of rows of a manifest file."""
    return int(pq.read_metadata(path).num_rows)
