"""Logs (`files`, `latents`, `prompts`): facts that stay true, added by fragments.

A fragment is one Parquet file with a name of its own; its publication is the commit. Any
number of processes may append at once, without locks, and a reader sees each fragment whole
or not at all. A merged fragment names in its metadata the ones it `replaces`; readers leave
those out, so that a listing that sees old and new at once still counts each row once. What was
replaced stays for a day, so that no listing can miss both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from manifests import parquet
from manifests.lock import maintenance_lock
from manifests.publish import is_id, new_id
from manifests.query import Source
from manifests.schema import Manifest

#: Past so many fragments a log is merged: listing a thousand takes a quarter of a second.
MERGE_AT = 1000

#: Fragments of at least so many rows are left as they are, so that no row is rewritten often.
LARGE_ROWS = 1_000_000

#: What was replaced is deleted this much later (seconds).
GRACE_SECONDS = 24 * 3600.0

#: Rows that are in memory at once while fragments are merged.
_ROWS_AT_ONCE = 200_000


@dataclass(frozen=True)
class Fragment:
    """A published fragment: its file, its metadata, and what the folder says of it."""

    path: Path
    metadata: dict[str, str]
    mtime: float

    @property
    def name(self) -> str:
        """What `replaces` calls it."""
        return self.path.stem

    @property
    def replaces(self) -> set[str]:
        """Names of the fragments whose rows it holds in their stead."""
        return set(self.metadata.get("replaces", "").split())


@dataclass(frozen=True)
class Listing:
    """The fragments of a log at one time: those that count, and those replaced.

    Files that cannot be read as manifests of ours are `torn` where they have a fragment's name,
    and `foreign` otherwise.
    `successors` gives, for each name that was ever replaced, when its first successor came.
    """

    current: list[Fragment]
    replaced: list[Fragment]
    torn: list[Path]
    foreign: list[Path]
    successors: dict[str, float]

    def may_go(self, replaced: Fragment, grace_seconds: float = GRACE_SECONDS) -> bool:
        """Whether a replaced fragment's first successor is older than `grace_seconds`."""
        return time.time() - self.successors[replaced.name] >= grace_seconds


@dataclass(frozen=True)
class Log:
    """The log of `manifest` in `folder`, written through `staging`."""

    manifest: Manifest
    folder: Path
    staging: Path

    def append(self, table: pa.Table, fragment_id: str | None = None, **metadata: str) -> Path:
        """Publish `table` as a new fragment and return its path."""
        final = self.folder / f"{fragment_id or new_id()}.parquet"
        return parquet.write(table, self.manifest, final, self.staging, **metadata)

    def listing(self) -> Listing:
        """What lies in the folder now, by name. Raises `ManifestError` as `read_metadata` does."""
        found: list[Fragment] = []
        torn: list[Path] = []
        foreign: list[Path] = []
        for path, facts in _parquet_files(self.folder):
            try:
                metadata = _metadata(path, facts, self.manifest)
            except FileNotFoundError:
                continue  # merged away between the listing and the reading
            if metadata is None:
                (torn if is_id(path.stem) else foreign).append(path)
            else:
                found.append(Fragment(path, metadata, facts.st_mtime))
        successors: dict[str, float] = {}
        for fragment in found:
            for name in fragment.replaces:
                successors[name] = min(successors.get(name, fragment.mtime), fragment.mtime)
        return Listing(
            [fragment for fragment in found if fragment.name not in successors],
            [fragment for fragment in found if fragment.name in successors],
            torn,
            foreign,
            successors,
        )

    def fragments(self) -> list[Path]:
        """The files that count, in name order. Files that are not ours are left out."""
        return [fragment.path for fragment in self.listing().current]

    def source(self) -> Source:
        """Its rows, for a query."""
        return Source(self.manifest, self.fragments)

    def read(self) -> pa.Table:
        """All rows of all fragments, in no promised order; no row when there is none."""
        tables = [parquet.read(path, self.manifest) for path in self.fragments()]
        return pa.concat_tables(tables) if tables else self.manifest.empty()

    def inputs(self) -> dict[str, dict[str, Any]]:
        """For each key that rows were made under (of a VAE, of a tokenizer), what it is made of."""
        return _inputs(self.listing().current)

    def is_crowded(self) -> bool:
        """Whether it is time to merge."""
        return len(self.listing().current) > MERGE_AT

    def merge(
        self, fragments: Iterable[Fragment], keep: Callable[[pa.Table], pa.Table] | None = None
    ) -> Path | None:
        """Publish one fragment with the rows of `fragments`, which it replaces.

        `keep` picks, out of some of the rows, those that are to stay. Nothing is done where
        there are no fragments. Only the holder of the maintenance lock may merge.
        """
        merged = list(fragments)
        if not merged:
            return None
        # What they replaced in their time may still lie there, and must not come back with them
        # gone.
        names = {fragment.name for fragment in merged}
        names |= {name for fragment in merged for name in fragment.replaces}
        lying = {path.stem for path, _ in _parquet_files(self.folder)}
        final = self.folder / f"{new_id()}.parquet"
        with parquet.writer(
            self.manifest,
            final,
            self.staging,
            replaces=" ".join(sorted(names & lying)),
            inputs=json.dumps(_inputs(merged), sort_keys=True),
        ) as write:
            for table in self._in_portions(merged):
                write(table if keep is None else keep(table))
        return final

    def merge_small(self) -> Path | None:
        """Merge all fragments but the large ones, and damaged ones, which stay for all to see."""
        small = [
            fragment
            for fragment in self.listing().current
            if parquet.row_count(fragment.path) < LARGE_ROWS and not parquet.damage(fragment.path)
        ]
        return self.merge(small) if len(small) > 1 else None

    def sweep(self, grace_seconds: float = GRACE_SECONDS) -> list[Path]:
        """Delete the replaced fragments whose successor is older than `grace_seconds`.

        Only the holder of the maintenance lock may sweep.
        """
        listing = self.listing()
        old = [f.path for f in listing.replaced if listing.may_go(f, grace_seconds)]
        for path in old:
            path.unlink(missing_ok=True)
        return old

    def _in_portions(self, fragments: list[Fragment]) -> Iterable[pa.Table]:
        """The rows of `fragments`, some at a time."""
        waiting: list[pa.Table] = []
        rows = 0
        for fragment in fragments:
            table = parquet.read(fragment.path, self.manifest)
            waiting.append(table)
            rows += table.num_rows
            if rows >= _ROWS_AT_ONCE:
                yield pa.concat_tables(waiting)
                waiting, rows = [], 0
        if waiting:
            yield pa.concat_tables(waiting)


def _parquet_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files in `folder` that may be fragments, by name."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".parquet"):
                with suppress(FileNotFoundError):  # merged away meanwhile
                    found.append((Path(entry.path), entry.stat()))
    return sorted(found, key=lambda one: one[0].name)


#: Metadata by file, size and modification time: a fragment never changes, and one command lists
#: the same ones several times.
_known: dict[tuple[str, str, int, int], dict[str, str] | None] = {}


def _metadata(path: Path, facts: os.stat_result, manifest: Manifest) -> dict[str, str] | None:
    identity = (str(path), manifest.name, facts.st_size, facts.st_mtime_ns)
    if identity not in _known:
        _known[identity] = parquet.read_metadata(path, manifest)
    return _known[identity]


def _inputs(fragments: list[Fragment]) -> dict[str, dict[str, Any]]:
    inputs: dict[str, dict[str, Any]] = {}
    for fragment in fragments:
        inputs |= json.loads(fragment.metadata.get("inputs", "{}"))
    return inputs


def merge_if_crowded(log: Log, lock: Path) -> Path | None:
    """Merge the small fragments of `log` where they have become many; sweep those long replaced.

    Does nothing where another process is at it: that one's work serves as well.
    """
    listing = log.listing()
    if not log.is_crowded() and not any(listing.may_go(f) for f in listing.replaced):
        return None
    with maintenance_lock(lock) as held:
        if not held:
            return None
        log.sweep()
        return log.merge_small() if log.is_crowded() else None
