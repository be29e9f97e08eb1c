"""Snapshots (`images`, `samples`): one file that says what holds now, replaced whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from manifests import parquet
from manifests.errors import ManifestError
from manifests.publish import discard, explained, publish
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
        several tables are never held all at once. `remarks` are written beside the metadata and
        do not count: they say why the snapshot was written.
        """
        current = self.metadata()
        same_metadata = current and all(current.get(k) == v for k, v in metadata.items())
        tables: Iterable[pa.Table] = rows
        if isinstance(rows, pa.Table):
            if same_metadata and self.read().equals(parquet.fitted(rows, self.manifest)):
                return False
            tables = [rows]
        unfinished = parquet.stage(
            tables, self.manifest, self.path, self.staging, **metadata, **(remarks or {})
        )
        if same_metadata and parquet.equal(unfinished, self.path, self.manifest):
            discard(unfinished)
            return False
        with explained(self.path):
            publish(unfinished, self.path)
        return True
