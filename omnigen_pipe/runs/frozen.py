"""Frozen samples: the join of samples, latents and prompts that a run trains on.

Made once, at the start of a run, as `runs/<name>/samples.arrow` (uncompressed Arrow IPC, so
that it can be mapped). It holds keys, prompt ids and checksums but no locations: those are
looked up at every start, so that shards may be moved under a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.errors import ManifestError, PipeError
from manifests.publish import publishing
from manifests.query import fingerprint, query
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.images.samples import current_samples
from omnigen_pipe.latents.shards import MASKS_KEY
from omnigen_pipe.latents.wanted import known_latents, known_masks, wanted_masks
from omnigen_pipe.prompts.wanted import known_prompts
from omnigen_pipe.runs.order import Epoch, Integers, epoch_order, steps_per_epoch
from omnigen_pipe.workspace import Workspace

#: Splits that are trained on; `eval` never is.
TRAINED_SPLITS = ("train", "regularisation")

_COLUMNS = (
    "sample_id",
    "dataset",
    "split",
    "bucket",
    "pixels_key",
    "checksum",
    "nbytes",
    "shape",
    "dtype",
    "repeats",
    "prompts",
    "mask_key",
)


@dataclass(frozen=True)
class Join:
    """What freezing found: the complete samples, and how many of the others lack what.

    `failed` are those whose image cannot be decoded; `incomplete` lack a latent, a mask that they
    should have, or a prompt so far; a mask counts as part of the latent.
    """

    table: pa.Table
    failed: int
    incomplete: int
    lacking_latent: int
    lacking_prompt: int


def join(workspace: Workspace, vae_key: str, tokenizer_key: str) -> Join:
    """Today's samples (status ok) with their latents and prompts, ordered by sample_id.

    Raises `PipeError` as `current_samples` does.
    """
    samples = current_samples(workspace)
    rows = query(
        """
        WITH wanted AS (SELECT * FROM samples WHERE status = 'ok'),
        places AS (
            SELECT sample_id, unnest(prompt_keys) AS prompt_key,
                   generate_subscripts(prompt_keys, 1) AS place
            FROM wanted
        ),
        ids AS (
            SELECT sample_id, list(p.input_ids ORDER BY place) AS prompts,
                   count(*) = count(p.input_ids) AS complete
            FROM places
            LEFT JOIN prompts AS p USING (prompt_key)
            GROUP BY sample_id
        )
        SELECT w.sample_id, w.dataset, w.split, w.bucket, w.pixels_key, w.repeats,
               l.checksum, l.nbytes, l.shape, l.dtype, i.prompts, w.mask_key,
               'failed' IN (coalesce(l.status, ''), coalesce(m.status, '')) AS failed,
               l.status IS NULL OR (w.mask_key IS NOT NULL AND m.status IS NULL) AS lacks_latent,
               i.complete IS NOT TRUE AS lacks_prompt
        FROM wanted AS w
        LEFT JOIN latents AS l USING (pixels_key)
        LEFT JOIN ids AS i USING (sample_id)
        LEFT JOIN masks AS m ON w.mask_key = m.pixels_key
        ORDER BY w.sample_id
        """,
        samples=samples,
        masks=known_masks(workspace, wanted_masks(samples)),
        latents=known_latents(workspace, vae_key),
        prompts=known_prompts(workspace, tokenizer_key),
    )
    failed, no_latent, no_prompt = (
        rows[name].combine_chunks() for name in ("failed", "lacks_latent", "lacks_prompt")
    )
    incomplete = pc.and_not(pc.or_(no_latent, no_prompt), failed)
    ready = pc.invert(pc.or_(failed, incomplete))
    return Join(
        rows.filter(ready).select(list(_COLUMNS)),
        failed=pc.sum(failed).as_py() or 0,
        incomplete=pc.sum(incomplete).as_py() or 0,
        lacking_latent=pc.sum(no_latent).as_py() or 0,
        lacking_prompt=pc.sum(pc.and_not(no_prompt, failed)).as_py() or 0,
    )


def content_key(table: pa.Table) -> str:
    """A key of everything in a join that training depends on, whatever shards it lies in."""
    names = [name for name in _COLUMNS if name != "checksum"]
    if table["mask_key"].null_count == table.num_rows:
        names.remove("mask_key")  # without masks the key is what it was before there were any
    return fingerprint(table, names)


def mask_keys(table: pa.Table) -> pa.ChunkedArray:
    """The mask_key of each frozen sample; null where it has none, as in runs of before."""
    if "mask_key" in table.column_names:
        return table["mask_key"]
    return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])


def freeze(table: pa.Table, path: Path, staging: Path, metadata: Mapping[str, str]) -> None:
    """Publish `table` as the frozen samples `path`, with `metadata` in its schema."""
    table = table.combine_chunks().replace_schema_metadata(dict(metadata))
    with (
        publishing(staging, path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def total_steps(config: TrainConfig, per_epoch: int) -> int:
    """Optimizer steps of a run of `per_epoch` steps an epoch; 0 where `config` says no end."""
    ends = (config.max_train_steps, config.num_train_epochs * per_epoch)
    return min((end for end in ends if end > 0), default=0)


def read(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """All frozen samples in `path`, mapped, and their metadata.

    Raises `ManifestError` for a damaged file.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    return table, {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}


def describe(path: Path) -> dict[str, Any]:
    """What the frozen samples in `path` are, for whoever looks at a run: how many of each split
    and bucket, how often they are seen, what was left out, and the keys of what they came from."""
    table, metadata = read(path)
    splits, buckets = (
        {row["values"]: row["counts"] for row in pc.value_counts(table[name]).to_pylist()}
        for name in ("split", "bucket")
    )
    trained = table.filter(pc.is_in(table["split"], pa.array(TRAINED_SPLITS, pa.string())))
    shown = pc.sum(trained["repeats"]).as_py() or 0
    keys = ("content", "vae_key", "tokenizer_key", "transformer_key")
    return {
        "samples": dict(sorted(splits.items())),
        "buckets": dict(sorted(buckets.items())),
        "samples_per_epoch": shown + trained.num_rows,
        "left_out": json.loads(metadata.get("left_out", "{}")),
        **{key: metadata[key] for key in keys if key in metadata},
    }


class _Prompts(NamedTuple):
    """Token ids of all prompts as Arrow holds them: the prompts of row r are those from `outer[r]`
    to `outer[r + 1]`, and the ids of prompt p those from `inner[p]` to `inner[p + 1]`. The offsets
    are views, whose single numbers come as Python's in half the time of an array's."""

    outer: memoryview
    inner: memoryview
    ids: NDArray[np.int32]


@dataclass(frozen=True)
class FrozenSamples:
    """The table, with the columns that order needs as arrays.

    A run may have millions of samples, so no Python object is kept of each: rows become such
    only where a micro-batch asks for them.
    """

    table: pa.Table
    metadata: dict[str, str]
    bucket_names: tuple[str, ...]
    buckets: NDArray[np.int64]
    repeats: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, splits: Sequence[str] = TRAINED_SPLITS) -> FrozenSamples:
        """Map `path` and keep the rows of `splits`; raises `ManifestError` for a damaged file."""
        table, metadata = read(path)
        chosen = pc.is_in(table["split"], pa.array(list(splits), pa.string()))
        if not pc.all(chosen, min_count=0).as_py():  # else it stays mapped
            table = table.filter(chosen)
        table = table.combine_chunks()
        names = sorted(pc.unique(table["bucket"]).to_pylist())
        codes = pc.index_in(table["bucket"], pa.array(names, pa.string()))
        return cls(
            table,
            metadata,
            tuple(names),
            np.asarray(codes.to_numpy(), dtype=np.int64),
            np.asarray(table["repeats"].to_numpy(), dtype=np.int64),
        )

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.table.num_rows)

    def order(self, epoch: int, config: TrainConfig, micro_batches: int) -> Epoch:
        """The order of `epoch`; see `runs.order`."""
        return epoch_order(
            self.buckets,
            self.repeats,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.train_batch_size,
            micro_batches=micro_batches,
        )

    def total_steps(self, config: TrainConfig, micro_batches: int) -> int:
        """Optimizer steps of the whole run: the earlier of its two ends."""
        per_epoch = steps_per_epoch(
            self.buckets, self.repeats, config.train_batch_size, micro_batches
        )
        return total_steps(config, per_epoch)

    def sample_ids(self, rows: Integers) -> list[str]:
        """The sample_id of each of `rows`."""
        offsets, content = self._ids
        return [str(content[offsets[row] : offsets[row + 1]], "utf-8") for row in rows.tolist()]

    def captions(self, row: int) -> int:
        """How many prompts `row` has."""
        outer = self._prompts.outer
        found: int = outer[row + 1] - outer[row]
        return found

    def prompt(self, row: int, caption: int) -> list[int]:
        """The token ids of one of the prompts of `row`."""
        outer, inner, ids = self._prompts
        place = outer[row] + caption
        found: list[int] = ids[inner[place] : inner[place + 1]].tolist()
        return found

    @cached_property
    def masked(self) -> NDArray[np.bool_]:
        """Which rows have a loss mask."""
        found: NDArray[np.bool_] = mask_keys(self.table).is_valid().to_numpy()
        return found

    @cached_property
    def in_split(self) -> dict[str, NDArray[np.bool_]]:
        """Which rows are in a split, by the names of the splits that there are."""
        column = self.table["split"]
        return {
            name: pc.equal(column, name).to_numpy()
            for name in sorted(pc.unique(column).to_pylist())
        }

    def regularised(self, rows: Integers) -> NDArray[np.bool_]:
        """Which of `rows` are regularisation data."""
        found = self.in_split.get("regularisation")
        return np.zeros(len(rows), dtype=bool) if found is None else found[rows]

    @cached_property
    def forms(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape `[8, H/8, W/8]` and dtype of the latents of each bucket, in the buckets' order.

        Raises `ManifestError` where those of one bucket differ.
        """
        column = self._column("shape")
        shapes = column.flatten().to_numpy().reshape(len(self), -1)
        dtypes = self._column("dtype").dictionary_encode()
        names, codes = dtypes.dictionary.to_pylist(), dtypes.indices.to_numpy()
        _, first = np.unique(self.buckets, return_index=True)
        if not all((each == each[first][self.buckets]).all() for each in (shapes, codes)):
            raise ManifestError(
                "The run's frozen samples hold latents of one bucket that differ in shape or "
                "dtype. Start a new run with another tracker_run_name."
            )
        return tuple((tuple(map(int, shapes[row])), names[codes[row]]) for row in first)

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        # Combining copies, also what is one chunk already.
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    @cached_property
    def _ids(self) -> tuple[memoryview, memoryview]:
        """Where each sample_id begins, and the bytes of all: twice as quick as Arrow's scalars."""
        column = self._column("sample_id")
        _, offsets, content = column.buffers()
        begins = np.frombuffer(offsets, np.int32)[column.offset :]
        return begins.data, memoryview(content)

    @cached_property
    def _prompts(self) -> _Prompts:
        column = self._column("prompts")
        inner = column.values
        return _Prompts(
            column.offsets.to_numpy().data, inner.offsets.to_numpy().data, inner.values.to_numpy()
        )

    def left_out(self) -> dict[str, int]:
        """How many samples the run was frozen without, by reason."""
        return {str(k): int(v) for k, v in json.loads(self.metadata.get("left_out", "{}")).items()}

    def dropout_prompt(self) -> list[int]:
        """The token ids that stand for a dropped prompt."""
        return [int(i) for i in json.loads(self.metadata["dropout_ids"])]

    def largest_token(self) -> int:
        """The largest token id of any prompt."""
        ids = pc.list_flatten(pc.list_flatten(self.table["prompts"]))
        return max(int(pc.max(ids).as_py()), *self.dropout_prompt())


class Places(NamedTuple):
    """Where arrays lie now, by row, and what their bytes must be.

    `shards` holds strings, one object for all rows of a shard; None where a row has no array.
    """

    shards: NDArray[np.object_]
    offsets: NDArray[np.int64]
    checksums: NDArray[np.uint64]


@dataclass(frozen=True)
class Locations:
    """Where each frozen sample's latent lies now, and its mask; `masks` is None without any.

    `reencoded` counts those latents whose bytes are not the ones that were frozen: encoded again
    since, in another batch, which may change their last bits. A mask has the same bytes always.
    """

    latents: Places
    reencoded: int
    masks: Places | None = None


def locate(workspace: Workspace, frozen: FrozenSamples) -> Locations:
    """Look up every latent and mask of `frozen`; raises `PipeError` where one is gone."""
    checksums = frozen.table["checksum"]
    latents, reencoded = _places(
        workspace, frozen.table["pixels_key"], checksums, frozen.metadata["vae_key"], "latents"
    )
    if not frozen.masked.any():
        return Locations(latents, reencoded)
    masks, _ = _places(workspace, mask_keys(frozen.table), checksums, MASKS_KEY, "masks")
    return Locations(latents, reencoded, masks)


def _places(
    workspace: Workspace,
    keys: pa.ChunkedArray,
    checksums: pa.ChunkedArray,
    vae_key: str,
    what: str,
) -> tuple[Places, int]:
    """Where the arrays with these `keys` lie, and how many have other `checksums`."""
    frozen = {"pixels_key": keys, "checksum": checksums, "row": pa.array(np.arange(len(keys)))}
    found = query(
        """
        SELECT l.shard, coalesce(l."offset", 0) AS "offset",
               coalesce(l.checksum, 0)::UBIGINT AS checksum,
               l.checksum <> f.checksum AS reencoded, f.pixels_key IS NULL AS unasked
        FROM frozen AS f
        LEFT JOIN (SELECT * FROM latents WHERE status = 'ok') AS l
        USING (pixels_key)
        ORDER BY f.row
        """,
        frozen=pa.table(frozen),
        latents=known_latents(workspace, vae_key),
    )
    asked = len(keys) - (pc.sum(found["unasked"]).as_py() or 0)
    gone = asked - (len(keys) - int(found["shard"].null_count))
    if gone:
        raise PipeError(
            f"{gone} of the run's {asked} {what} are gone. Run `omnigen-pipe encode-vae` "
            "to make them again, or start a new run with another tracker_run_name."
        )
    shards = found["shard"].combine_chunks().dictionary_encode()
    names = np.array([*shards.dictionary.to_pylist(), None], dtype=object)
    places = Places(
        names[shards.indices.fill_null(len(names) - 1).to_numpy()],
        found["offset"].to_numpy(),
        found["checksum"].to_numpy(),
    )
    return places, pc.sum(found["reencoded"]).as_py() or 0
