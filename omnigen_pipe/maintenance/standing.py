"""How each stage stands: what is current, missing, failed and no longer used, and why.

Each stage is judged by what it would find if those before it had run: `status` says what a whole
run would do. Nothing is written, downloaded or encoded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.errors import ManifestError, PipeError, UsageError
from manifests.query import Source, query
from manifests.views import current_latents, current_prompts
from omnigen_pipe import settings
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.images.catalogue import changed_since_discover
from omnigen_pipe.images.samples import (
    changed_since_bucket,
    make_samples,
    samples_fingerprint,
)
from omnigen_pipe.images.survey import Survey
from omnigen_pipe.images.weighing import known_verdicts
from omnigen_pipe.latents.vae import inputs_key, vae_inputs
from omnigen_pipe.latents.wanted import (
    STATUS_COLUMNS,
    known_latents,
    known_masks,
    wanted_latents,
    wanted_masks,
    with_status,
)
from omnigen_pipe.maintenance.needs import needed_latents
from omnigen_pipe.model_files import local_model_part
from omnigen_pipe.prompts import tokenizer as tokenizers
from omnigen_pipe.prompts.wanted import known_prompts, missing_prompts, wanted_prompts
from omnigen_pipe.runs.frozen import TRAINED_SPLITS, FrozenSamples, total_steps
from omnigen_pipe.runs.order import steps_per_epoch
from omnigen_pipe.runs.run import Run
from omnigen_pipe.runs.terms import check_settings, frozen_settings
from omnigen_pipe.workspace import Workspace

#: Bytes that a latent takes in a shard beside its array: two headers, JSON, padding.
_MEMBER_BYTES = 2048

_BYTES_PER_VALUE = {"fp16": 2, "fp32": 4}


#: The columns of samples that decide whether two of them are the same.
_SAMPLE_COLUMNS = [
    "sample_id",
    "dataset",
    "split",
    "path",
    "content_hash",
    "bucket",
    "resize_width",
    "resize_height",
    "crop_left",
    "crop_top",
    "pixels_key",
    "captions",
    "prompt_keys",
    "mask_path",
    "mask_hash",
    "mask_key",
    "repeats",
    "status",
    "reason",
]


@dataclass
class Standing:
    """One stage. `why` are phrases on what is missing or would change; `cost` is what a run
    would do, in numbers. `unit` is what the counts count."""

    stage: str
    unit: str
    current: int = 0
    missing: int = 0
    failed: int = 0
    unused: int = 0
    unused_bytes: int = 0
    why: list[str] = field(default_factory=list)
    cost: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dict(vars(self))


def of_discover(workspace: Workspace, survey: Survey) -> Standing:
    """Files as they are now, against images.parquet."""
    standing = Standing("discover", "files")
    rows = query(
        """
        SELECT count(*) FILTER (today.path IS NULL) AS gone,
               count(*) FILTER (old.path IS NULL) AS new,
               count(*) FILTER (old.path = today.path AND (old.content_hash, old.size,
                   old.mtime_ns) IS DISTINCT FROM (today.content_hash, today.size, today.mtime_ns))
                   AS touched,
               count(*) FILTER (old.path = today.path
                   AND old.captions IS DISTINCT FROM today.captions) AS captions,
               count(*) FILTER (old.path = today.path
                   AND old.mask_hash IS DISTINCT FROM today.mask_hash
                   AND (old.mask_path, today.mask_path) IS DISTINCT FROM (NULL, NULL)) AS masks,
               count(*) FILTER (old IS NOT DISTINCT FROM today) AS same,
               count(*) FILTER (old.path = today.path AND old IS DISTINCT FROM today) AS changed,
               count(*) FILTER (today.status = 'rejected') AS rejected
        FROM images AS old FULL JOIN survey AS today USING (dataset, path)
        """,
        images=workspace.images.source(),
        survey=survey.images,
    ).to_pylist()[0]
    new = max(0, survey.unread - survey.unread_known) + rows["new"]
    standing.current = rows["same"] - survey.unread_known
    standing.failed = rows["rejected"]
    standing.unused = rows["gone"]
    standing.missing = survey.unread + rows["new"] + rows["changed"]
    reasons = {
        "new": new,
        "changed on disk": survey.unread_known + rows["touched"],
        "with other captions": rows["captions"],
        "with other masks": rows["masks"],
    }
    standing.why = [f"{number:,} {reason}" for reason, number in reasons.items() if number]
    if workspace.images.exists():
        standing.why += changed_since_discover(workspace.images, workspace.config.datasets)
    standing.cost = {"files to open": survey.unread, "bytes to read": survey.unread_bytes}
    return standing


def of_bucket(
    workspace: Workspace, images: pa.Table | Source
) -> tuple[Standing, pa.Table | Source]:
    """Samples as they would be made of `images`, against samples.parquet; and these samples."""
    standing = Standing("bucket", "samples")
    standing.why = changed_since_bucket(workspace) if workspace.samples.exists() else []
    fingerprint = samples_fingerprint(images, workspace.config)
    fresh = workspace.samples.metadata().get("fingerprint") == fingerprint
    if not fresh and workspace.samples.exists():
        standing.why.append("images or captions changed")
    samples: pa.Table | Source = workspace.samples.source()
    if not fresh or standing.why:
        verdicts = known_verdicts(workspace)  # a mask that is not known yet passes for a good one
        made = make_samples(images, workspace.config, judge=lambda _: verdicts)
        parts = [part.select(_SAMPLE_COLUMNS) for part in made]
        empty = workspace.samples.manifest.empty().select(_SAMPLE_COLUMNS)
        samples = pa.concat_tables(parts) if parts else empty
    columns = ", ".join(_SAMPLE_COLUMNS)
    rows = query(
        f"""
        SELECT count(*) FILTER (today.sample_id IS NULL) AS gone,
               count(*) FILTER (today.sample_id IS NOT NULL
                   AND old IS DISTINCT FROM today) AS wanted,
               count(*) FILTER (old IS NOT DISTINCT FROM today) AS same,
               count(*) FILTER (today.status <> 'ok') AS left_out
        FROM (SELECT {columns} FROM manifest) AS old
        FULL JOIN (SELECT {columns} FROM samples) AS today USING (sample_id)
        """,
        manifest=workspace.samples.source(),
        samples=samples,
    ).to_pylist()[0]
    standing.current, standing.missing = rows["same"], rows["wanted"]
    standing.failed, standing.unused = rows["left_out"], rows["gone"]
    standing.cost = {"rows to write": rows["wanted"] + rows["same"] if rows["wanted"] else 0}
    return standing, samples


def of_encode_vae(
    workspace: Workspace, samples: pa.Table | Source, images: pa.Table | Source
) -> Standing:
    """Latents and masks that `samples` want, against the log."""
    standing = Standing("encode-vae", "latents")
    masks = wanted_masks(samples)
    without = with_status(masks, known_masks(workspace, masks))["status"].null_count
    if masks.num_rows:
        standing.current = masks.num_rows - without
        standing.missing = without
        standing.unit = "latents and masks"
    if without:
        standing.why.append(f"{without:,}: masks that are not at hand in this geometry")
        standing.cost = {"masks to make": without}
    wanted = wanted_latents(samples)
    folder = local_model_part(workspace, "vae")
    if folder is None:
        standing.why.append("the VAE is not fetched yet: encode-vae does that first")
        standing.missing += wanted.num_rows
        return standing
    inputs = vae_inputs(workspace, folder, remember=False)
    key = inputs_key(inputs)
    latents = with_status(wanted, known_latents(workspace, key, STATUS_COLUMNS))
    counts = query("SELECT status, count(*) AS n FROM latents GROUP BY status", latents=latents)
    by_status = {row["status"]: row["n"] for row in counts.to_pylist()}
    standing.current += by_status.get("ok", 0)
    standing.failed = by_status.get("failed", 0)
    standing.missing += by_status.get(None, 0)
    standing.unused, standing.unused_bytes = _unused_latents(workspace, samples, key, standing)
    missing = query("SELECT * FROM latents WHERE status IS NULL", latents=latents)
    if missing.num_rows:
        standing.why += _why_missing(workspace, missing, key, inputs)
        standing.cost |= _encoding_cost(workspace, missing, images)
    return standing


def _unused_latents(
    workspace: Workspace, samples: pa.Table | Source, key: str, standing: Standing
) -> tuple[int, int]:
    """How many latents, of how many bytes, neither `samples` nor any run needs."""
    try:
        needs = needed_latents(workspace, samples, key)
    except ManifestError as error:
        standing.why.append(f"what is no longer used is not known: {error}")
        return 0, 0
    (row,) = query(
        """
        SELECT count(*) AS n, coalesce(sum(nbytes), 0)::BIGINT AS nbytes
        FROM latents ANTI JOIN needs USING (pixels_key, vae_key) WHERE status = 'ok'
        """,
        latents=current_latents(
            workspace.latents.source(),
            workspace.root,
            columns=["pixels_key", "vae_key", "status", "nbytes"],
        ),
        needs=needs,
    ).to_pylist()
    return row["n"], row["nbytes"]


def _why_missing(
    workspace: Workspace, missing: pa.Table, key: str, inputs: dict[str, str]
) -> list[str]:
    """Phrases that say, for all of `missing`, why the log has no latent that counts."""
    rows = query(
        """
        WITH judged AS (
            SELECT m.pixels_key,
                   bool_or(l.vae_key = $1 AND l.status = 'ok') AS lost,
                   max(l.vae_key) FILTER (l.vae_key <> $1 AND l.status = 'ok') AS other,
                   any_value(m.content_hash) IN (
                       SELECT content_hash FROM latents WHERE content_hash IS NOT NULL
                   ) AS moved
            FROM missing AS m LEFT JOIN latents AS l USING (pixels_key) GROUP BY m.pixels_key
        )
        SELECT CASE WHEN lost THEN 'lost' WHEN other IS NOT NULL THEN 'vae'
                    WHEN moved THEN 'geometry' ELSE 'new' END AS kind,
               CASE WHEN lost IS NOT TRUE THEN other END AS other, count(*) AS n
        FROM judged GROUP BY ALL ORDER BY ALL
        """,
        key,
        missing=missing.select(["pixels_key", "content_hash"]),
        latents=workspace.latents.source(),
    ).to_pylist()
    known = workspace.latents.inputs()
    last = json.loads(workspace.samples.metadata().get("changes", "[]"))
    phrases = []
    for row in rows:
        number = f"{row['n']:,}"
        if row["kind"] == "lost":
            phrases.append(f"{number}: their shard is gone, cut short or damaged")
        elif row["kind"] == "vae":
            differs = settings.changes(known.get(row["other"], {}), inputs)
            phrases.append(f"{number}: {settings.listed(differs)}")
        elif row["kind"] == "geometry":
            differs = changed_since_bucket(workspace) or last
            because = f" ({settings.listed(differs)})" if differs else ""
            phrases.append(f"{number}: images that have latents in another geometry{because}")
        else:
            phrases.append(f"{number}: images that have no latents yet")
    return phrases


def _encoding_cost(
    workspace: Workspace, missing: pa.Table, images: pa.Table | Source
) -> dict[str, int]:
    (row,) = query(
        """
        WITH sides AS (
            SELECT content_hash, split_part(bucket, 'x', 1)::BIGINT
                   * split_part(bucket, 'x', 2)::BIGINT AS pixels FROM missing
        ), sizes AS (SELECT content_hash, min(size) AS size FROM images GROUP BY content_hash)
        SELECT count(*) AS latents, count(DISTINCT content_hash) AS images,
               sum(pixels // 64 * 8 * $1 + $2)::BIGINT AS written,
               (SELECT coalesce(sum(size), 0) FROM sizes SEMI JOIN missing USING (content_hash))
                   ::BIGINT AS read
        FROM sides
        """,
        _BYTES_PER_VALUE[workspace.config.vae.latent_dtype],
        _MEMBER_BYTES,
        missing=missing,
        images=images,
    ).to_pylist()
    return {
        "images to decode": row["images"],
        "latents to encode": row["latents"],
        "bytes to read": row["read"],
        "bytes to write": row["written"],
    }


def of_tokenize(workspace: Workspace, samples: pa.Table | Source) -> Standing:
    """Prompts that `samples` and the configuration want, against the log."""
    standing = Standing("tokenize", "prompts")
    wanted = wanted_prompts(workspace, samples)
    folder = local_model_part(workspace, "tokenizer")
    if folder is None:
        standing.why.append("the tokenizer is not fetched yet: tokenize does that first")
        standing.missing = wanted.num_rows
        return standing
    tokenizer = tokenizers.load(folder)
    missing = missing_prompts(wanted, known_prompts(workspace, tokenizer.key, ["prompt_key"]))
    (row,) = query(
        """
        SELECT count(*) AS n FROM known
        WHERE (prompt_key, tokenizer_key) NOT IN (SELECT (prompt_key, $1) FROM wanted)
        """,
        tokenizer.key,
        known=current_prompts(workspace.prompts.source(), columns=["prompt_key", "tokenizer_key"]),
        wanted=wanted.select(["prompt_key"]),
    ).to_pylist()
    standing.current = wanted.num_rows - missing.num_rows
    standing.missing, standing.unused = missing.num_rows, row["n"]
    standing.cost = {"prompts to tokenise": missing.num_rows}
    rows = query(
        """
        SELECT other, count(*) AS n FROM (
            SELECT m.prompt_key, max(p.tokenizer_key) AS other
            FROM missing AS m LEFT JOIN prompts AS p USING (prompt_key) GROUP BY m.prompt_key
        ) GROUP BY other ORDER BY other
        """,
        missing=missing.select(["prompt_key"]),
        prompts=workspace.prompts.source(),
    ).to_pylist()
    known = workspace.prompts.inputs()
    for row in rows:
        differs = settings.changes(known.get(row["other"], {}), tokenizer.inputs)
        because = settings.listed(differs) if row["other"] else "new or edited captions"
        standing.why.append(f"{row['n']:,}: {because}")
    return standing


def of_train(workspace: Workspace, samples: pa.Table | Source) -> Standing:
    """Steps of the configured run, which would freeze `samples` where it has not begun."""
    config = workspace.config.train
    standing = Standing("train", "steps")
    run = Run(config.tracker_run_name, workspace.run_folder(config.tracker_run_name))
    try:
        lokr = workspace.lokr()
        checkpoint, notes = run.resume_point("latest")
        standing.why += notes
        if not run.has_begun():
            standing.missing = _steps(config, samples)
            standing.cost = {"steps to train": standing.missing}
            standing.why.append(f"the run {run.name} has no checkpoint yet")
            return standing
        start = run.start()
        check_settings(run.name, start.settings, frozen_settings(config, lokr))
        total = FrozenSamples.open(run.samples).total_steps(config, start.micro_batches)
    except (PipeError, UsageError) as error:
        standing.why.append(f"train would stop: {error}")
        return standing
    standing.current = checkpoint.position.step if checkpoint else 0
    standing.missing = max(0, total - standing.current)
    standing.cost = {"steps to train": standing.missing}
    return standing


def _steps(config: TrainConfig, samples: pa.Table | Source) -> int:
    """The steps of a run that would freeze `samples` now."""
    rows = query(
        "SELECT bucket, repeats FROM samples WHERE status = 'ok' AND list_contains($1, split)",
        list(TRAINED_SPLITS),
        samples=samples,
    )
    buckets = rows["bucket"].combine_chunks().dictionary_encode().indices.to_numpy()
    batch, micro = config.train_batch_size, config.gradient_accumulation_steps
    epoch = steps_per_epoch(
        buckets.astype(np.int64), rows["repeats"].to_numpy().astype(np.int64), batch, micro
    )
    return total_steps(config, epoch)
