"""Snapshots (`images`, `samples`): one file that says what holds now, replaced whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests import parquet
from manifests.errors import ManifestError
from manifests.query import Source
from manifests.schema import Manifest


@dataclass(frozen=True)
class Snapshot:
    """The snapshot of `manifest` at `path`, written through `staging`."""

    manifest: Manifest
    path: Path
    staging: Path

    def exists(self) -> bool:
        """Whether it was ever published."""
        return self.path.exists()

    def metadata(self) -> dict[str, str]:
        """Its key-value metadata; empty when there is no snapshot yet."""
        if not self.exists():
            return {}
        found = parquet.read_metadata(self.path, self.manifest)
        if found is None:
            raise ManifestError(
                f"{self.path} is not a manifest of omnigen-pipe. Move it away and run "
                f"`omnigen-pipe {self.manifest.stage}` again."
            )
        return found

    def source(self) -> Source:
        """Its rows, for a query; no row when there is no snapshot yet."""
        return Source(self.manifest, lambda: [self.path] if self.metadata() else [])

    def read(self) -> pa.Table:
        """All rows, with columns in the schema's order; no row when there is no snapshot yet."""
        if not self.metadata():
            return self.manifest.empty()
        return parquet.read(self.path, self.manifest)

    def replace(
        self,
        rows: pa.Table | Iterable[pa.Table],
        remarks: Mapping[str, str] | None = None,
        **metadata: str,
    ) -> bool:
        """Publish `rows` unless the snapshot already holds them; True when it was written.

        Rows must come in an order that depends on their content alone. `metadata` counts as
        content: the same rows made from other settings are written again. Rows that come in
        several tables are never held all at once, and nothing is written while they are those
        that the snapshot holds. `remarks` are written beside the metadata and do not count: they
        say why the snapshot was written, and from which file.
        """
        written = {**metadata, **(remarks or {})}
        current = self.metadata()
        changed = any(current.get(k) != v for k, v in metadata.items())
        if isinstance(rows, pa.Table):
            same = bool(current) and not changed and self._holds(rows)
            if not same:
                self._write([rows], written)
            return not same
        parts = iter(rows)
        if not current or changed or parquet.damage(self.path):
            self._write(parts, written)
            return True
        # Open to the end, should another process replace it meanwhile.
        with pq.ParquetFile(self.path) as file:
            take = parquet.reader(file, self.manifest)
            sizes: list[int] = []
            for part in parts:
                part = parquet.fitted(part, self.manifest)
                if not take(part.num_rows).equals(part):
                    parts = itertools.chain([part], parts)
                    break
                sizes.append(part.num_rows)
            else:
                if take(1).num_rows == 0:
                    return False
            # What was made already and let go again is the same as what the file begins with.
            begin = map(parquet.reader(file, self.manifest), sizes)
            self._write(itertools.chain(begin, parts), written)
        return True

    def _holds(self, rows: pa.Table) -> bool:
        """Whether these are its rows; False where it is damaged."""
        try:
            return bool(
                parquet.read(self.path, self.manifest).equals(parquet.fitted(rows, self.manifest))
            )
        except ManifestError:
            return False

    def _write(self, parts: Iterable[pa.Table], metadata: Mapping[str, str]) -> None:
        with parquet.writer(self.manifest, self.path, self.staging, **metadata) as add:
            for part in parts:
                add(part)
