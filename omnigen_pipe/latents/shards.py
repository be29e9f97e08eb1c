"""Shards: WebDataset tars of latents of one bucket, written once and read by offset.

A shard is built under `staging/`; its tar is published first, then its fragment of the
`latents` log, so a shard counts from the moment its fragment is there. The bytes of a tar
depend on its samples alone: no times, no owners, no paths. Given up: compression, which float16
moments do not reward, and appending, which would make half-written shards possible.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from io import FileIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash

from manifests.errors import PipeError, WriteError
from manifests.keys import key
from manifests.log import merge_if_crowded
from manifests.publish import discard, new_id, publish, staged
from manifests.schema import LATENTS
from omnigen_pipe.workspace import Workspace

#: The last part of a member's name, after the pixels_key.
MOMENTS_SUFFIX = ".moments.npy"
MASK_SUFFIX = ".mask.npy"
FACTS_SUFFIX = ".json"

#: What stands in the place of a VAE's key where a loss mask is kept as a latent is.
MASKS_KEY = key("loss masks")
#: The folders of their shards are the buckets' with this before, so that readers of latents meet
#: latents alone.
MASKS_FOLDER = "masks-"

#: The only types of raw arrays, by their names in the manifest; little-endian on any machine.
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

_MEBIBYTE = 1024 * 1024

#: So many shards stay open for reading in each thread that reads, a file descriptor each.
OPEN_SHARDS = 192

#: After so many fragments a writer looks whether the log is crowded: once in hours.
_LOOK_EVERY = 250


class ShardError(PipeError):
    """A shard cannot give a latent that the manifest promises."""


class MissingShardError(ShardError):
    """The shard is gone: removed by hand, or replaced by maintenance since it was looked up."""


class DamagedLatentError(ShardError):
    """The bytes in the shard are not those that were written."""


def shard_path(root: Path, shard: str) -> Path:
    """The file that a manifest's `shard` names, which must lie in the workspace's `latents/`.

    Raises `ShardError` for any other path: a manifest may come from somebody else.
    """
    return shard_paths(root)(shard)


def shard_paths(root: Path) -> Callable[[str], Path]:
    """`shard_path` of one workspace, for many shards: their folders are looked at only once."""
    latents = root / "latents"

    @cache
    def is_inside(folder: Path) -> bool:
        return folder.resolve().is_relative_to(latents.resolve())

    def path_of(shard: str) -> Path:
        relative = PurePosixPath(shard)
        path = root / relative
        lexical = relative.parts[:1] == ("latents",) and ".." not in relative.parts
        # A link in the place of the file itself may lead anywhere, whatever folder it lies in.
        inside = is_inside(path if path.is_symlink() else path.parent) if lexical else False
        if not inside:
            raise ShardError(
                f"The manifests in {root / 'manifests' / 'latents'} name the shard {shard!r}, "
                f"which does not lie in {latents}. They were not written by omnigen-pipe; remove "
                "them and run `omnigen-pipe encode-vae` again."
            )
        return path

    return path_of


def read_latent(
    path: Path, offset: int, nbytes: int, checksum: int, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """The moments that lie `nbytes` long at `offset` of the shard `path`, checked: `shape`.

    Raises `MissingShardError` where there is no such file, and `DamagedLatentError` where the
    XXH3-64 of the bytes is not `checksum` or they do not fit `shape` and `dtype`.
    """
    if dtype not in DTYPES or int(np.prod(shape)) * DTYPES[dtype].itemsize != nbytes:
        raise DamagedLatentError(_damaged(path, offset))
    latent: np.ndarray = np.empty(shape, DTYPES[dtype])
    with _opened(path) as handle:
        _fill(latent.reshape(-1).view(np.uint8).data, handle, offset, checksum)
    return latent


class OpenShards:
    """Shards of one workspace that stay open between reads, at most `limit` of them.

    A shard that was removed or replaced since the last read is seen, so that its room on the disk
    is not held for long; what is read is checked in any case. Read and not mapped: reading fills
    the array in one pass over the bytes, without a page table for each latent, and a file that is
    cut short is an error where a mapped page behind its end would kill the process. Not to be
    shared between threads.
    """

    def __init__(self, root: Path, limit: int = OPEN_SHARDS) -> None:
        self._path_of = shard_paths(root)
        self._limit = limit
        self._open: OrderedDict[str, FileIO] = OrderedDict()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def read(self, shard: str, offset: int, checksum: int, latent: memoryview) -> None:
        """Fill the bytes of `latent` with those that lie at `offset` of `shard`, checked.

        Raises `MissingShardError` and `DamagedLatentError` as `read_latent` does, and `ShardError`
        for a path outside the workspace's `latents/`.
        """
        handle = self._open.get(shard)
        if handle is not None and _is_current(handle):
            self._open.move_to_end(shard)
        else:
            self._close(shard)
            handle = self._open[shard] = _opened(self._path_of(shard))
            if len(self._open) > self._limit:
                self._close(next(iter(self._open)))
        _fill(latent, handle, offset, checksum)

    def forget(self) -> None:
        """Close all: a removed shard takes room on the disk for as long as it is open."""
        for shard in list(self._open):
            self._close(shard)

    def __del__(self) -> None:
        """Those of a thread that has ended are of no use."""
        self.forget()

    def _close(self, shard: str) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            handle.close()


def _opened(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_current(handle: FileIO) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.fstat(handle.fileno()).st_nlink > 0
    except OSError:  # on a network's disk, removed from elsewhere
        return False


def _fill(latent: memoryview, handle: FileIO, offset: int, checksum: int) -> None:
    """Fill the bytes of `latent` from `offset` on, and check what they are then."""
    try:
        handle.seek(offset)
        filled = handle.readinto(latent)
        while 0 < filled < len(latent) and (more := handle.readinto(latent[filled:])):
            filled += more
    except OSError as error:
        raise _unreadable(handle.name, error) from error
    if filled < len(latent) or xxhash.xxh3_64_intdigest(latent) != checksum:
        raise DamagedLatentError(_damaged(handle.name, offset))


def _unreadable(path: Path | str, error: OSError) -> PipeError:
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return MissingShardError(
            f"The shard {path} is gone. Run `omnigen-pipe encode-vae`: it encodes again what is "
            "missing."
        )
    return PipeError(f"The shard {path} cannot be read: {error.strerror}.")


def _damaged(path: Path | str, offset: int) -> str:
    return (
        f"The latent at byte {offset} of {path} is not what was written: its checksum or length "
        "differs. Run `omnigen-pipe verify --repair`, which marks what is damaged, then "
        "`omnigen-pipe encode-vae`, which makes it again; and check the disk."
    )


@dataclass
class _Shard:
    """The open tar: where it is written, and the rows of what it holds."""

    id: str
    bucket: str
    staged_path: Path
    final: Path
    handle: IO[bytes]
    opened_at: float
    digest: Any = field(default_factory=xxhash.xxh3_64)
    nbytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.handle.write(data)
        self.digest.update(data)
        self.nbytes += len(data)

    def member(self, name: str, data: bytes) -> int:
        """Append a file and return the offset of its first byte."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no owner names
        info.size = len(data)
        self.write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        start = self.nbytes
        self.write(data)
        self.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return start


class ShardWriter:
    """Packs latents into shards, one open for each bucket, and publishes each as it is full or old.

    How many are open is up to its user, who says with `close_all_but` which buckets go on. Use it
    as a context manager. Leaving it publishes what is open, also when an exception passes
    through, as long as every sample in it is whole; only an error of writing itself discards
    what is open. Failures are rows of the log too and go with the next fragment.
    """

    def __init__(
        self,
        workspace: Workspace,
        vae_key: str,
        metadata: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workspace = workspace
        self._vae_key = vae_key
        self._clock = clock
        self._metadata = metadata
        self._shards: dict[str, _Shard] = {}
        self._failures: list[dict[str, Any]] = []
        self._failing_since = 0.0
        self._broken = False
        self._published = 0
        #: Bytes of the tars published so far.
        self.bytes_written = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._broken:
                self.close()
        finally:
            if self._broken:
                self._discard()

    def add(self, pixels_key: str, bucket: str, moments: np.ndarray, facts: dict[str, Any]) -> None:
        """Append one sample: `moments` `[8, H/8, W/8]` (of a mask its weights `[1, H/8, W/8]`), and
        `facts` for its JSON.

        Raises `WriteError` where the disk is full or not writable; shards published before stay
        as they are.
        """
        dtype = moments.dtype.name
        raw: np.ndarray = np.ascontiguousarray(moments, DTYPES[dtype])
        npy = io.BytesIO()
        np.lib.format.write_array(npy, raw, version=(1, 0), allow_pickle=False)
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        self._broken = True  # until the sample is whole
        shard = self._shards.get(bucket) or self._open(bucket)
        try:
            suffix = MASK_SUFFIX if self._vae_key == MASKS_KEY else MOMENTS_SUFFIX
            end = shard.member(pixels_key + suffix, npy.getvalue()) + npy.tell()
            shard.member(pixels_key + FACTS_SUFFIX, text.encode("utf-8"))
        except OSError as error:
            raise WriteError(shard.final, error) from error
        shard.rows.append(
            {
                "pixels_key": pixels_key,
                "content_hash": facts.get("content_hash"),
                "bucket": bucket,
                "offset": end - raw.nbytes,
                "nbytes": raw.nbytes,
                "checksum": xxhash.xxh3_64_intdigest(raw.data),
                "shape": list(raw.shape),
                "dtype": dtype,
                "status": "ok",
            }
        )
        self._broken = False
        options = self._workspace.config.vae
        if shard.nbytes >= options.shard_size_mb * _MEBIBYTE:
            self._close(shard)
        self.close_if_old()

    def add_failure(self, pixels_key: str, bucket: str, reason: str) -> None:
        """Record that these pixels cannot be encoded: a fact about the image's content."""
        if not self._failures:
            self._failing_since = self._clock()
        self._failures.append(
            {"pixels_key": pixels_key, "bucket": bucket, "status": "failed", "reason": reason}
        )
        self.close_if_old()

    def close_if_old(self) -> None:
        """Publish each open shard, and the failures, whose first row is older than
        `shard_seconds`."""
        old = self._clock() - self._workspace.config.vae.shard_seconds
        for shard in [each for each in self._shards.values() if each.opened_at <= old]:
            self._close(shard)
        if self._failures and self._failing_since <= old:
            self._close(None)

    def close_all_but(self, buckets: Collection[str]) -> None:
        """Publish the open shards of other buckets than `buckets`."""
        for shard in [each for each in self._shards.values() if each.bucket not in buckets]:
            self._close(shard)

    def close(self) -> None:
        """Publish the open shards and the failures, if there are any."""
        self.close_all_but(())
        if self._failures:
            self._close(None)

    def _close(self, shard: _Shard | None) -> None:
        """Publish `shard`, if one is given, and the failures in one fragment."""
        rows = list(self._failures)
        self._broken = True  # until all is published
        if shard is not None:
            rows += self._publish_tar(shard)
        self._workspace.latents.append(
            self._as_table(rows), shard.id if shard else None, **self._metadata
        )
        if shard is not None:
            self.bytes_written += shard.nbytes
            del self._shards[shard.bucket]
        self._failures, self._broken = [], False
        self._published += 1
        if self._published % _LOOK_EVERY == 0:
            merge_if_crowded(self._workspace.latents, self._workspace.maintenance_lock)

    def _open(self, bucket: str) -> _Shard:
        shard_id = new_id()
        folder = (MASKS_FOLDER if self._vae_key == MASKS_KEY else "") + bucket
        final = self._workspace.latents_folder / folder / f"{shard_id}.tar"
        try:
            path = staged(self._workspace.staging, final)
            handle = path.open("xb")
        except OSError as error:
            raise WriteError(final, error) from error
        shard = _Shard(shard_id, bucket, path, final, handle, self._clock())
        self._shards[bucket] = shard
        return shard

    def _publish_tar(self, shard: _Shard) -> list[dict[str, Any]]:
        """Finish and publish the tar; returns its rows, complete but for common columns."""
        try:
            shard.write(bytes(2 * tarfile.BLOCKSIZE))
            shard.write(bytes(-shard.nbytes % tarfile.RECORDSIZE))
            shard.handle.close()
            publish(shard.staged_path, shard.final)
        except OSError as error:
            raise WriteError(shard.final, error) from error
        whole = {
            "shard": shard.final.relative_to(self._workspace.root).as_posix(),
            "shard_nbytes": shard.nbytes,
            "shard_checksum": shard.digest.intdigest(),
        }
        return [row | whole for row in shard.rows]

    def _as_table(self, rows: list[dict[str, Any]]) -> pa.Table:
        common = {"vae_key": self._vae_key, "written_at_ns": time.time_ns()}
        return pa.Table.from_pylist([row | common for row in rows], schema=LATENTS.schema)

    def _discard(self) -> None:
        """Remove the open shards, one of which is not whole, from `staging/`."""
        for shard in self._shards.values():
            # What it had no room for before, it has no room for when it is closed.
            with suppress(OSError):
                shard.handle.close()
            discard(shard.staged_path)
        self._shards.clear()
