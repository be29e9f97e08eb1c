"""Logs (`files`, `latents`, `prompts`): facts that stay true, added by fragments.

A fragment is one Parquet file with a name of its own; its publication is the commit. Any
number of processes may append at once, without locks, and a reader sees each fragment whole
or not at all. A merged fragment names in its metadata the ones it `replaces`; readers leave
those out, so that a listing that sees old and new at once still counts each row once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from manifests import parquet
from manifests.publish import new_id
from manifests.query import Source
from manifests.schema import Manifest


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

    def fragments(self) -> list[Path]:
        """The fragments that count, in name order. Files that are not ours are left out."""
        replaced: set[str] = set()
        found: list[Path] = []
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                metadata = parquet.read_metadata(path, self.manifest)
            except FileNotFoundError:
                continue  # merged away between the listing and the reading
            if metadata is None:
                continue
            replaced.update(metadata.get("replaces", "").split())
            found.append(path)
        return [path for path in found if path.stem not in replaced]

    def source(self) -> Source:
        """Its rows, for a query."""
        return Source(self.manifest, self.fragments)

    def read(self) -> pa.Table:
        """All rows of all fragments, in no promised order; no row when there is none."""
        tables = [parquet.read(path, self.manifest) for path in self.fragments()]
        return pa.concat_tables(tables) if tables else self.manifest.empty()
