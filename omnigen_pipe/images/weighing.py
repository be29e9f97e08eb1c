"""Weighing: mask files are read and decoded in threads, and become the weights of latents.

bucket asks only whether any weight is left, encode-vae keeps them. Both call the same function on
the same pixels, so a mask that bucket let pass is never empty in training.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import PipeError
from manifests.query import Source, query
from omnigen_pipe.cores import usable_cores
from omnigen_pipe.images.mask_files import mask_root
from omnigen_pipe.images.masks import EMPTY, Kind, latent_weights, read_mask
from omnigen_pipe.images.originals import ChangedSourceError, read_original
from omnigen_pipe.images.pixels import PixelsError
from omnigen_pipe.images.sources import dataset_root
from omnigen_pipe.workspace import Workspace

#: Rows that are Python's objects at a time.
_ROWS = 4096


@dataclass(frozen=True)
class MaskItem:
    """One mask in one geometry, in pixels, and the files that hold it. `name` is for messages."""

    name: str
    mask_key: str
    mask_hash: str
    kind: Kind
    bucket: tuple[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]
    paths: tuple[Path, ...]

    @property
    def bucket_name(self) -> str:
        """The bucket as manifests write it."""
        return f"{self.bucket[0]}x{self.bucket[1]}"


#: The weights of an item, or why there are none.
Weighed = np.ndarray | PixelsError | ChangedSourceError


def mask_items(
    workspace: Workspace, samples: pa.Table | Source, keys: pa.Table
) -> Iterator[MaskItem]:
    """The masks of usable `samples` whose mask_key stands in `keys`, those of one file together.

    Made as they are asked for: of millions of rows a few thousand are Python's at a time. Raises
    `UsageError`, at once, where a folder is gone.
    """
    rows = query(
        """
        SELECT mask_key, mask_hash, mask_path IS NULL AS alpha, bucket, resize_width,
               resize_height, crop_left, crop_top,
               list_sort(list(DISTINCT struct_pack(dataset, path := coalesce(mask_path, path))))
                   AS files
        FROM samples SEMI JOIN keys USING (mask_key) WHERE status = 'ok' GROUP BY ALL
        ORDER BY bucket, mask_hash, alpha, mask_key
        """,
        samples=samples,
        keys=keys.select(["mask_key"]),
    )
    files = pc.list_flatten(rows["files"])
    needed = set(pc.unique(pc.struct_field(files, "dataset")).to_pylist())
    roots = {
        d.id: mask_root(workspace, d) or dataset_root(workspace, d)
        for d in workspace.config.datasets
        if d.id in needed
    }
    batches = rows.to_batches(max_chunksize=_ROWS)
    return (_item(row, roots) for batch in batches for row in batch.to_pylist())


def _item(row: dict[str, Any], roots: Mapping[str, Path]) -> MaskItem:
    width, height = row["bucket"].split("x")
    first = row["files"][0]
    return MaskItem(
        name=f"{first['dataset']}: {first['path']}",
        mask_key=row["mask_key"],
        mask_hash=row["mask_hash"],
        kind="alpha" if row["alpha"] else "greyscale",
        bucket=(int(width), int(height)),
        resize=(row["resize_width"], row["resize_height"]),
        crop=(row["crop_left"], row["crop_top"]),
        paths=tuple(roots[file["dataset"]] / file["path"] for file in row["files"]),
    )


def weigh(items: Iterable[MaskItem]) -> Generator[tuple[MaskItem, Weighed], None, None]:
    """Each item with its weights, float32 `[H/8, W/8]`, or what is wrong with its file, in order.

    A file is read and decoded once for neighbours that lie in it. Raises `PipeError` where memory
    is too short.
    """

    def of_file(file: list[MaskItem]) -> list[Weighed]:
        try:
            paths = [path for item in file for path in item.paths]
            mask = read_mask(read_original(paths, file[0].mask_hash), file[0].kind)
        # Never the error itself: its traceback would keep the half-decoded mask alive.
        except ChangedSourceError as error:
            return [ChangedSourceError(error.faults)] * len(file)
        except PixelsError as error:
            return [PixelsError(str(error))] * len(file)
        return [latent_weights(mask, item.bucket, item.resize, item.crop) for item in file]

    waiting = (list(file) for _, file in groupby(items, key=lambda i: (i.mask_hash, i.kind)))
    pending: deque[tuple[list[MaskItem], Future[list[Weighed]]]] = deque()
    workers = usable_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="masks")

    def submit(number: int) -> None:
        for file in islice(waiting, number):
            pending.append((file, pool.submit(of_file, file)))

    # Pillow warns of odd metadata in words that name no file; filters are global to the process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            submit(2 * workers)
            while pending:
                file, future = pending.popleft()
                try:
                    weighed = future.result()
                except MemoryError:
                    raise PipeError(
                        f"There is too little memory to decode {file[0].name}."
                    ) from None
                yield from zip(file, weighed, strict=True)
                submit(1)
        finally:
            pool.shutdown(cancel_futures=True)


def known_verdicts(workspace: Workspace) -> dict[str, str | None]:
    """By mask_key, why a mask cannot be used, or None: as samples.parquet says.

    A key is an address of content, so what was found of it once holds for ever. Not so for what
    could not be read: another version of Pillow may.
    """
    rows = query(
        """
        SELECT DISTINCT mask_key, CASE WHEN status <> 'ok' THEN reason END AS reason FROM samples
        WHERE mask_key IS NOT NULL AND (status = 'ok' OR reason = ?)
        """,
        EMPTY,
        samples=workspace.samples.source(),
    )
    return dict(zip(rows["mask_key"].to_pylist(), rows["reason"].to_pylist(), strict=True))


@dataclass
class Judge:
    """Says of samples with masks which of these cannot be used; remembers what it has seen.

    Only masks that `known` does not know are opened; `opened` counts them.
    """

    workspace: Workspace
    known: dict[str, str | None]
    opened: int = 0

    def __call__(self, samples: pa.Table) -> dict[str, str | None]:
        """The verdicts on the masks of `samples`, and on others.

        Raises `PipeError` where a mask is no longer what discover saw.
        """
        missing = set(samples["mask_key"].to_pylist()) - self.known.keys()
        if missing:
            keys = pa.table({"mask_key": pa.array(sorted(missing), pa.string())})
            for item, weighed in weigh(mask_items(self.workspace, samples, keys)):
                self.known[item.mask_key] = verdict(weighed)
                self.opened += 1
        return self.known


def verdict(weighed: Weighed) -> str | None:
    """Why such a mask cannot be used; None where it can.

    Raises `PipeError` where its file is no longer what discover saw: nothing is known then.
    """
    if isinstance(weighed, ChangedSourceError):
        raise PipeError(f"{weighed}. Run `omnigen-pipe discover` again.") from weighed
    if isinstance(weighed, PixelsError):
        return f"mask cannot be used: {weighed}"
    return None if weighed.any() else EMPTY
