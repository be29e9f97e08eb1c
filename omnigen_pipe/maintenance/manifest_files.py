"""The files of manifests: each is read from end to end, and what is not ours is told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from manifests import parquet
from manifests.errors import ManifestError
from manifests.publish import is_id
from manifests.query import Source, query
from manifests.schema import Manifest
from omnigen_pipe.progress import Progress
from omnigen_pipe.workspace import Workspace

#: So many bytes of manifest files are compared at once; in memory they are a few times larger.
_BATCH_NBYTES = 32 * 2**20


@dataclass
class ManifestFiles:
    """What reading the manifest files found; `damaged` with the problem of each."""

    checked: int = 0
    damaged: dict[Path, tuple[Manifest, str]] = field(default_factory=dict)
    foreign: list[Path] = field(default_factory=list)


def check_manifest_files(workspace: Workspace, progress: Progress) -> ManifestFiles:
    """Read every Parquet file in manifests/ and in the folders of logs from end to end."""
    found = ManifestFiles()
    good: dict[str, tuple[Manifest, list[Path]]] = {}
    files = list(_manifest_files(workspace))
    with progress.task("verify manifests", len(files)) as advance:
        for path, manifest in files:
            advance(1)
            try:
                problem = _problem(path, manifest) if manifest else None
            except FileNotFoundError:
                continue  # merged away since it was listed
            if problem is None:
                found.foreign.append(path)
                continue
            found.checked += 1
            if manifest and problem:
                found.damaged[path] = (manifest, problem)
            elif manifest:
                good.setdefault(manifest.name, (manifest, []))[1].append(path)
    for manifest, paths in good.values():
        for batch in _batches(paths):
            for path, problem in _misread(manifest, batch).items():
                found.damaged[path] = (manifest, problem)
    found.damaged = {path: fault for path, fault in found.damaged.items() if path.exists()}
    return found


def _batches(paths: list[Path]) -> Iterator[list[Path]]:
    """`paths` in order, cut where more than a few mebibytes would be held in memory at once."""
    batch: list[Path] = []
    nbytes = 0
    for path in paths:
        size = path.stat().st_size if path.exists() else 0
        if batch and nbytes + size > _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(path)
        nbytes += size
    if batch:
        yield batch


def _misread(manifest: Manifest, paths: list[Path]) -> dict[Path, str]:
    """Those of `paths` that DuckDB cannot read, or reads other rows from than Arrow does.

    Headers and statistics have no checksums, and DuckDB, which the stages read with, believes
    others of them than Arrow does. All files are asked about at once, and by halves only where
    that fails: a query costs more than a file.
    """
    try:
        equal = query(
            """
            SELECT (SELECT sum(hash(asked)) FROM asked)
                   IS NOT DISTINCT FROM (SELECT sum(hash(stored)) FROM stored) AS equal
            """,
            asked=Source(manifest, lambda: paths),
            stored=pa.concat_tables([parquet.read(path, manifest) for path in paths]),
        )["equal"][0].as_py()
        problem = "" if equal else "its statistics do not fit its rows"
    except (duckdb.Error, pa.ArrowException, ManifestError, OSError, UnicodeDecodeError) as error:
        problem = str(error).splitlines()[0]
    if not problem:
        return {}
    if len(paths) == 1:
        return {paths[0]: problem}
    half = len(paths) // 2
    return {**_misread(manifest, paths[:half]), **_misread(manifest, paths[half:])}


def _manifest_files(workspace: Workspace) -> Iterator[tuple[Path, Manifest | None]]:
    """Every file that could be a manifest, and which; None where nothing reads that name."""
    snapshots = {s.path: s.manifest for s in (workspace.images, workspace.samples)}
    for path in sorted((workspace.root / "manifests").glob("*.parquet")):
        yield path, snapshots.get(path)
    for log in (workspace.files, workspace.latents, workspace.prompts):
        for path in sorted(log.folder.glob("*.parquet")):
            yield path, log.manifest


def _problem(path: Path, manifest: Manifest) -> str | None:
    """What is wrong with a manifest file: nothing (""), or None where it is not one of ours.

    Pages carry checksums, and what surrounds them has to make sense. `FileNotFoundError` passes
    through.
    """
    metadata = parquet.read_metadata(path, manifest)
    damage = parquet.damage(path)
    if metadata is None:
        ours = path.parent.name != manifest.name or is_id(path.stem)
        if damage and (ours or _begins_as_parquet(path)):
            return damage
        return "it does not say that omnigen-pipe wrote it" if ours else None
    if damage:
        return damage
    # An older version's file lacks columns and a newer one's has more; only damage does both.
    schema = pq.read_schema(path)
    names, known = set(schema.names), set(manifest.schema.names)
    if names - known and known - names:
        return f"its column {min(known - names)} is called {min(names - known)}"
    for name in sorted(names & known):
        if schema.field(name).type != manifest.schema.field(name).type:
            return f"its column {name} holds {schema.field(name).type}"
    return ""


def _begins_as_parquet(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) == b"PAR1"
