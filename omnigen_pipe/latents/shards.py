"""Shards: WebDataset tars of latents of one bucket, written once and read by offset.

A shard is built under `staging/`; its tar is published first, then its fragment of the
`latents` log, so a shard counts from the moment its fragment is there. The bytes of a tar
depend on its samples alone: no times, no owners, no paths. Given up: compression, which float16
moments do not reward, and appending, which would make half-written shards possible.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

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

#: So many shards stay mapped for reading in each thread that reads, a file descriptor each.
MAPPED_SHARDS = 192

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
    _copy(_mapped(path), offset, checksum, latent)
    return latent


class MappedShards:
    """Shards of one workspace that stay open and mapped between reads, at most `limit` of them.

    What it hands out is a copy. A shard that was removed or replaced since the last read is seen,
    and so is one cut short: a page behind the end of a file would kill the process. Not to be
    shared between threads.
    """

    def __init__(self, root: Path, limit: int = MAPPED_SHARDS) -> None:
        self._path_of = shard_paths(root)
        self._limit = limit
        self._mapped: OrderedDict[str, _Mapped] = OrderedDict()

    def __len__(self) -> int:
        """How many are mapped."""
        return len(self._mapped)

    def read(self, shard: str, offset: int, checksum: int, latent: np.ndarray) -> None:
        """Fill the contiguous `latent` with the bytes that lie at `offset` of `shard`, checked.

        Raises `MissingShardError` and `DamagedLatentError` as `read_latent` does, and `ShardError`
        for a path outside the workspace's `latents/`.
        """
        mapped = self._mapped.get(shard)
        if mapped is not None and mapped.is_current():
            self._mapped.move_to_end(shard)
        else:
            self._mapped.pop(shard, None)
            mapped = self._mapped[shard] = _mapped(self._path_of(shard))
            if len(self._mapped) > self._limit:
                self._mapped.popitem(last=False)
        _copy(mapped, offset, checksum, latent)

    def forget(self) -> None:
        """Unmap all: a removed shard takes room on the disk for as long as it is mapped."""
        self._mapped.clear()


@dataclass(frozen=True)
class _Mapped:
    """A mapped shard: its bytes, and which file it was, by device, inode and size."""

    path: str
    content: NDArray[np.uint8]
    identity: tuple[int, int, int]

    def is_current(self) -> bool:
        """Whether the path still leads to the file that is mapped, and to all of it."""
        try:
            return _identity(os.stat(self.path)) == self.identity
        except OSError:
            return False


def _identity(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size


def _mapped(path: Path) -> _Mapped:
    try:
        with path.open("rb") as handle:
            identity = _identity(os.fstat(handle.fileno()))
            # An empty file cannot be mapped, and holds nothing.
            content = (
                np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                if identity[2]
                else np.zeros(0, np.uint8)
            )
    except FileNotFoundError as error:
        raise MissingShardError(
            f"The shard {path} is gone. Run `omnigen-pipe encode-vae`: it encodes again what is "
            "missing."
        ) from error
    except OSError as error:
        raise PipeError(f"The shard {path} cannot be read: {error.strerror}.") from error
    return _Mapped(str(path), content, identity)


def _copy(mapped: _Mapped, offset: int, checksum: int, latent: np.ndarray) -> None:
    """Fill `latent` from `offset` on. Checked is the copy: it is what is used."""
    raw = latent.reshape(-1).view(np.uint8)
    content = mapped.content[offset : offset + len(raw)]
    if len(content) != len(raw):
        raise DamagedLatentError(_damaged(mapped.path, offset))
    raw[:] = content  # NumPy lets other threads run meanwhile, also while the disk is waited for
    if xxhash.xxh3_64_intdigest(raw.data) != checksum:
        raise DamagedLatentError(_damaged(mapped.path, offset))


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
