"""From rows of images to rows of samples: every image of every dataset, with geometry and keys.

DuckDB counts, numbers and hashes; NumPy does the geometry, one call per dataset. Nothing is
done row by row, and no more than some of the images are in memory at once. What comes out depends
only on the set of image rows and the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3

from manifests.errors import PipeError
from manifests.keys import key_sql
from manifests.query import Source, fingerprint, query, stream
from omnigen_pipe import settings
from omnigen_pipe.ahead import done_ahead
from omnigen_pipe.config import MAX_BUCKET_SIDE, Config
from omnigen_pipe.cores import usable_cores
from omnigen_pipe.images import pixels
from omnigen_pipe.images.catalogue import check_discovered
from omnigen_pipe.images.geometry import GEOMETRY_VERSION, Fault, Geometry, plan
from omnigen_pipe.images.masks import policy as mask_policy
from omnigen_pipe.prompts.template import TEMPLATE_KEY, prompt_key_sql
from omnigen_pipe.workspace import Workspace

#: The columns of `images` that samples are made from.
IMAGE_COLUMNS = (
    "dataset", "path", "content_hash", "width", "height", "captions", "mask_path", "mask_hash",
    "status", "reason",
)  # fmt: skip

#: The options of a dataset that samples depend on; the others only change `images`.
SAMPLE_OPTIONS = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "upscale",
    "crop",
    "crop_aspect",
    "crop_aspect_buckets",
    "crop_style",
    "crop_seed",
    "crops_per_image",
    "aspect_bucket_alignment",
    "aspect_bucket_rounding",
    "repeats",
)

#: So many images make a portion, of which those are in memory that are planned at once, one more,
#: and the one that was handed out.
IMAGES_AT_ONCE = 50_000
#: The most portions that are planned at once.
_AT_ONCE = 4

_OPTIONS = pa.schema(
    [
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("repeats", pa.int32()),
        ("crops", pa.int32()),
        ("crop_seed", pa.string()),
    ]
)
#: Columns that only a used sample has.
_SHOWN = ("resize_width", "resize_height", "crop_left", "crop_top", "bucket")

#: By mask_key why a mask cannot be used; None where it can.
Verdicts = Mapping[str, str | None]

_GEOMETRY_COLUMNS = tuple(field.name for field in fields(Geometry))


def samples_settings(config: Config) -> dict[str, Any]:
    """Everything in the configuration that samples depend on.

    The samples snapshot carries it as `settings`; where the two differ, `bucket` has to run
    again. The order of datasets in the file does not matter.
    """
    return {
        settings.DATASETS: {
            d.id: {"split": d.split} | {option: getattr(d, option) for option in SAMPLE_OPTIONS}
            for d in config.datasets
        },
        "pixels": pixels.policy(config.pixels),
        "prompt template": TEMPLATE_KEY,
        "version of the geometry": GEOMETRY_VERSION,
    }


def changed_since_bucket(workspace: Workspace) -> list[str]:
    """What differs between today's configuration and that which samples.parquet was made with."""
    then = settings.from_text(workspace.samples.metadata().get("settings", ""))
    return settings.changes(then, samples_settings(workspace.config))


def current_samples(workspace: Workspace) -> Source:
    """The rows of samples.parquet, made with today's configuration from today's images.

    Raises `PipeError` naming the command to run where there are none, or they are stale.
    """
    snapshot = workspace.samples
    if not snapshot.exists():
        raise PipeError(
            f"There is no {snapshot.path}: run `omnigen-pipe bucket` first, or `omnigen-pipe run` "
            "for all stages."
        )
    if workspace.images.exists():
        check_discovered(workspace.images, workspace.config.datasets)
    changed = changed_since_bucket(workspace)
    if changed:
        raise PipeError(
            f"{snapshot.path} was made with other settings ({settings.listed(changed)}): run "
            "`omnigen-pipe bucket` again, or `omnigen-pipe run` for all stages."
        )
    if not _of_these_images(workspace):
        raise PipeError(
            f"{snapshot.path} was made from other images than {workspace.images.path} holds now: "
            "run `omnigen-pipe bucket` again, or `omnigen-pipe run` for all stages."
        )
    return snapshot.source()


def _of_these_images(workspace: Workspace) -> bool:
    """Whether samples.parquet, of today's settings, was made from what images.parquet holds now.

    The bytes of the file say it a hundred times faster than its rows. These are looked at where
    it was written anew since, perhaps with other columns than samples are made from.
    """
    made_from = workspace.samples.metadata()
    if workspace.images.exists() and made_from.get("images_blake3") == images_hash(workspace):
        return True
    now = samples_fingerprint(workspace.images.source(), workspace.config)
    return made_from.get("fingerprint") == now


def images_hash(workspace: Workspace) -> str:
    """BLAKE3 of the bytes of images.parquet."""
    return blake3(max_threads=blake3.AUTO).update_mmap(workspace.images.path).hexdigest()


def samples_fingerprint(images: pa.Table | Source, config: Config) -> str:
    """A key of what samples are made from: the rows of the configured datasets that are enabled."""
    ids = [dataset.id for dataset in config.datasets]
    return fingerprint(images, list(IMAGE_COLUMNS), "list_contains($1::VARCHAR[], dataset)", ids)


def make_samples(
    images: pa.Table | Source,
    config: Config,
    rows: int = IMAGES_AT_ONCE,
    judge: Callable[[pa.Table], Verdicts] | None = None,
) -> Iterator[pa.Table]:
    """The samples of all `images` whose dataset is configured and enabled, in several tables.

    They come by (dataset, path, crop_index), those of about `rows` images at once, with the
    manifest's columns. A rejected image stays rejected with its reason. One that an option leaves
    out is `filtered`, and its reason names the option and the numbers. `judge` is asked, of samples
    with masks, which of these masks cannot be used: such a sample is rejected.
    """

    def planned(numbered: pa.Table) -> pa.Table:
        crops = _crops(numbered, config)
        geometry = _geometry(crops, config)
        for name in _GEOMETRY_COLUMNS:
            crops = crops.append_column(name, pa.array(getattr(geometry, name)))
        return _with_keys(crops, config)

    # A portion is planned by one core: several are while the one before is written.
    portions = _numbered_images(images, config, rows)
    threads = min(_AT_ONCE, usable_cores())
    for samples in done_ahead(portions, planned, threads, threads):
        if judge is not None and samples["mask_key"].null_count < samples.num_rows:
            masked = samples.filter(pc.is_valid(samples["mask_key"]))
            samples = _without(samples, judge(masked))
        yield samples


def causes_of_absence(samples: pa.Table | Source, config: Config) -> list[tuple[str, str, int]]:
    """Dataset, cause, and how many of its images are not used for it; the most frequent first.

    A cause is a reason without what is peculiar to a single image. `config` is the one that the
    samples were made with.
    """
    counted = query(
        """
        WITH absent AS (
            SELECT dataset, status, reason FROM samples WHERE status <> 'ok' AND crop_index = 0
        ), named AS (
            SELECT dataset, split_part(reason, ': ', 1) AS cause FROM absent
            WHERE status = 'rejected'
            UNION ALL
            SELECT dataset, cause
            FROM absent JOIN causes USING (dataset)
            WHERE status = 'filtered' AND starts_with(reason, split_part(form, '{', 1))
        )
        SELECT dataset, cause, count(*) AS n FROM named GROUP BY ALL ORDER BY n DESC, dataset, cause
        """,
        samples=samples,
        causes=_causes(config),
    )
    return list(zip(*(column.to_pylist() for column in counted.columns), strict=True))


def _numbered_images(images: pa.Table | Source, config: Config, rows: int) -> Iterator[pa.Table]:
    """The wanted images by dataset and path, those with equal bytes in a dataset numbered from 0.

    Only images whose bytes occur again are sorted by them: that is rare.
    """
    ids = [dataset.id for dataset in config.datasets]
    return stream(
        f"""
        WITH slim AS NOT MATERIALIZED (
            SELECT dataset, path, content_hash FROM images
            WHERE list_contains($1::VARCHAR[], dataset) AND content_hash IS NOT NULL
        ), repeated AS (
            SELECT dataset, content_hash FROM slim GROUP BY ALL HAVING count(*) > 1
        ), numbers AS (
            SELECT dataset, path,
                   row_number() OVER (PARTITION BY dataset, content_hash ORDER BY path) - 1
                   AS number
            FROM slim SEMI JOIN repeated USING (dataset, content_hash)
        )
        SELECT {", ".join(IMAGE_COLUMNS)}, coalesce(number, 0) AS number
        FROM images LEFT JOIN numbers USING (dataset, path)
        WHERE list_contains($1::VARCHAR[], dataset)
        ORDER BY dataset, path
        """,
        ids,
        rows=rows,
        images=images,
    )


def _crops(numbered: pa.Table, config: Config) -> pa.Table:
    """One row per image and crop, in no promised order, with ids and random numbers."""
    options = [
        {
            "dataset": d.id,
            "split": d.split,
            "repeats": d.repeats,
            "crops": d.crops_per_image,
            # A null leaves the crop's random numbers out.
            "crop_seed": str(d.crop_seed) if d.crop and d.crop_style == "random" else None,
        }
        for d in config.datasets
    ]
    content_id = key_sql("dataset", "content_hash", "crop_index", "number")
    path_id = key_sql("dataset", "'path'", "path", "crop_index")
    spot = key_sql("crop_seed", "content_hash", "crop_index")
    return query(
        f"""
        WITH crops AS (
            SELECT numbered.*, split, repeats, crop_seed,
                   unnest(range(crops))::INTEGER AS crop_index
            FROM numbered JOIN options USING (dataset)
        ), spots AS (
            SELECT *, {spot} AS spot, coalesce({content_id}, {path_id}) AS sample_id FROM crops
        )
        SELECT * EXCLUDE (crop_seed, number, spot),
               coalesce(('0x' || left(spot, 16))::UBIGINT, 0) AS random_x,
               coalesce(('0x' || right(spot, 16))::UBIGINT, 0) AS random_y
        FROM spots
        """,
        numbered=numbered,
        options=pa.Table.from_pylist(options, schema=_OPTIONS),
    )


def _geometry(rows: pa.Table, config: Config) -> Geometry:
    """The geometry of every row, by the options of its dataset."""
    # A rejected image may have no size; 1x1 stands in and is never looked at.
    width, height = _numbers(rows, "width", 1), _numbers(rows, "height", 1)
    random_x, random_y = _numbers(rows, "random_x", 0), _numbers(rows, "random_y", 0)
    ids = pa.array([dataset.id for dataset in config.datasets])
    codes = np.asarray(pc.index_in(rows["dataset"], ids).to_numpy())
    columns = {name: np.zeros(rows.num_rows, np.int64) for name in _GEOMETRY_COLUMNS}
    for code, dataset in enumerate(config.datasets):
        own = np.flatnonzero(codes == code)
        part = plan(width[own], height[own], dataset, random_x[own], random_y[own])
        for name, column in columns.items():
            column[own] = getattr(part, name)
    return Geometry(**columns)


def _numbers(rows: pa.Table, column: str, missing: int) -> npt.NDArray[Any]:
    return np.asarray(rows[column].fill_null(missing).to_numpy())


def _causes(config: Config) -> pa.Table:
    """Per dataset and fault: the `cause`, and the `form` of the reason of a single image.

    What stands before the first field tells the reasons of a dataset apart. Fields of a form:
    {0}x{1} the image, {2}x{3} the resize it would need, {4} the bucket.
    """
    rows = []
    for d in config.datasets:
        unit = f"({d.resolution_type})"
        minimum = f"smaller than minimum_image_size = {d.minimum_image_size:.12g} {unit}"
        maximum = f"larger than maximum_image_size = {d.maximum_image_size:.12g} {unit}"
        long = f"bucket side over OmniGen's limit of {MAX_BUCKET_SIDE} px"
        mend = "set upscale = true or lower resolution"
        for fault, cause, form in (
            (Fault.TOO_SMALL, minimum, f"{minimum}: {{0}}x{{1}}"),
            (Fault.TOO_LARGE, maximum, f"{maximum}: {{0}}x{{1}}"),
            (Fault.TOO_LONG, long, f"{long}: {{0}}x{{1}} would need the bucket {{4}}"),
            (
                Fault.UPSCALED,
                f"would be upscaled; {mend}",
                f"would be upscaled from {{0}}x{{1}} to {{2}}x{{3}} for bucket {{4}}; {mend}",
            ),
        ):
            rows.append({"dataset": d.id, "fault": int(fault), "cause": cause, "form": form})
    return pa.Table.from_pylist(rows)


def _without(samples: pa.Table, verdicts: Verdicts) -> pa.Table:
    """`samples` with those rejected whose mask, by `verdicts`, cannot be used.

    They keep their mask_key: it says of what the reason is true, so that nobody has to look again.
    """
    faults = {name: reason for name, reason in verdicts.items() if reason is not None}
    if not faults:
        return samples
    emptied = ", ".join(
        f"CASE WHEN v.fault IS NULL THEN {name} END AS {name}" for name in (*_SHOWN, "pixels_key")
    )
    return query(
        f"""
        SELECT s.* REPLACE (
            {emptied}, coalesce(v.fault, reason) AS reason,
            CASE WHEN v.fault IS NULL THEN status ELSE 'rejected' END AS status
        ) FROM samples AS s LEFT JOIN verdicts AS v USING (mask_key)
        ORDER BY dataset, path, crop_index
        """,
        samples=samples,
        verdicts=pa.table({"mask_key": list(faults), "fault": list(faults.values())}),
    )


def _with_keys(rows: pa.Table, config: Config) -> pa.Table:
    """The finished samples: status, reason and keys, and the geometry of the used ones."""
    used = ", ".join(f"CASE WHEN status = 'ok' THEN {name} END AS {name}" for name in _SHOWN)
    policy = "'" + pixels.policy(config.pixels).replace("'", "''") + "'"
    pixels_key = key_sql("content_hash", *_SHOWN, policy)
    kind = f"CASE WHEN mask_path IS NULL THEN '{mask_policy('alpha')}' "
    kind += f"ELSE '{mask_policy('greyscale')}' END"
    mask_key = key_sql("mask_hash", *_SHOWN, kind)
    return query(
        f"""
        WITH judged AS (
            SELECT rows.* EXCLUDE (status, reason),
                   bucket_width || 'x' || bucket_height AS bucket,
                   CASE WHEN rows.status <> 'ok' THEN 'rejected'
                        WHEN rows.fault <> {int(Fault.NONE)} THEN 'filtered'
                        ELSE 'ok' END AS status,
                   CASE WHEN rows.status <> 'ok' THEN coalesce(rows.reason, 'no reason given')
                        WHEN form IS NOT NULL
                        THEN format(form, width, height, resize_width, resize_height, bucket)
                        END AS reason
            FROM rows LEFT JOIN causes USING (dataset, fault)
        )
        SELECT sample_id, dataset, split, path, content_hash, width, height, crop_index, {used},
               CASE WHEN status = 'ok' THEN {pixels_key} END AS pixels_key,
               captions,
               list_transform(captions, lambda c: {prompt_key_sql("c")}) AS prompt_keys,
               mask_path, mask_hash,
               CASE WHEN status = 'ok' AND mask_hash IS NOT NULL THEN {mask_key} END AS mask_key,
               repeats, status, reason
        FROM judged ORDER BY dataset, path, crop_index
        """,
        rows=rows,
        causes=_causes(config),
    )
