"""One sample, from its file to its batches: everything that the manifests and runs say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.errors import PipeError, UsageError
from manifests.query import query
from manifests.views import current_latents, current_prompts
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.images.sources import reachable_roots
from omnigen_pipe.latents.shards import MASKS_KEY, shard_paths
from omnigen_pipe.latents.vae import inputs_key, vae_inputs
from omnigen_pipe.model_files import local_model_part
from omnigen_pipe.prompts import tokenizer as tokenizers
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.runs.run import Run
from omnigen_pipe.workspace import Workspace

#: So much of a sample_id is enough where only one begins with it.
_PREFIX = re.compile(r"[0-9a-f]{6,32}")

#: So many samples are explained, and so many similar paths named.
_MOST = 20
_SIMILAR = 3

_FILES = pa.schema([("dataset", pa.string()), ("path", pa.string())])


@dataclass(frozen=True)
class Keys:
    """The keys of the model's VAE and tokenizer, under which latents and ids count; None where
    one is not known on this machine."""

    vae: str | None = None
    tokenizer: str | None = None


def vae_key_here(workspace: Workspace) -> str | None:
    """The key of the workspace's VAE; None where it would have to be fetched first. Raises
    `UsageError` or `OSError` where it cannot be read."""
    folder = local_model_part(workspace, "vae")
    return None if folder is None else inputs_key(vae_inputs(workspace, folder, remember=False))


def tokenizer_key_here(workspace: Workspace) -> str | None:
    """The same of its tokenizer."""
    folder = local_model_part(workspace, "tokenizer")
    return None if folder is None else tokenizers.load(folder).key


def explain(workspace: Workspace, wanted: str) -> list[dict[str, Any]]:
    """What is known of the samples that `wanted` names: a sample_id or its beginning, or a path.

    A path is relative to its dataset's folder, with or without `DATASET:` before it, or one from
    the current folder. Raises `UsageError` where nothing, or too much, has that name.
    """
    roots = reachable_roots(workspace)
    samples = _samples(workspace, wanted, roots)
    if not samples:
        raise UsageError(_unknown(workspace, wanted, roots))
    if len(samples) > _MOST:
        raise UsageError(f"{len(samples)} samples begin with {wanted}: give more of the sample_id.")
    keys = Keys(vae_key_here(workspace), tokenizer_key_here(workspace))
    explained = explain_samples(workspace, samples, roots, keys)
    return [{**one, "runs": _runs(workspace, one["sample_id"])} for one in explained]


def explain_samples(
    workspace: Workspace, samples: list[dict[str, Any]], roots: dict[str, Path], keys: Keys
) -> list[dict[str, Any]]:
    """The same of rows of the samples manifest, but for the runs; `roots` are the datasets' folders
    within reach. The manifests are asked once for all of them. Without one of `keys` no latent, or
    no prompt, counts."""
    images = _images(workspace, samples)
    latents = {}
    if keys.vae is not None:
        latents = _known(workspace, keys.vae, [row["pixels_key"] for row in samples])
    masks = _masks(workspace, [row["mask_key"] for row in samples if row["mask_key"]])
    prompts = {}
    if keys.tokenizer is not None:
        wanted = [key for row in samples for key in row["prompt_keys"]]
        prompts = _prompts(workspace, keys.tokenizer, wanted)
    return [
        {
            **{name: row[name] for name in ("sample_id", "dataset", "path", "split")},
            "status": row["status"],
            "reason": row["reason"],
            "file": _file(row, roots),
            "image": images.get((row["dataset"], row["path"])),
            "geometry": _geometry(row),
            "latent": latents.get(row["pixels_key"]),
            "vae_key": keys.vae,
            "mask": _mask(row, masks),
            "prompts": [
                {"text": text, "prompt_key": key, **prompts.get(key, {"input_ids": None})}
                for text, key in zip(row["captions"], row["prompt_keys"], strict=True)
            ],
            "repeats": row["repeats"],
        }
        for row in samples
    ]


def _samples(workspace: Workspace, wanted: str, roots: dict[str, Path]) -> list[dict[str, Any]]:
    """The samples that `wanted` names."""
    dataset, colon, path = wanted.partition(":")
    places = [{"dataset": None, "path": wanted}]
    if colon:
        places.append({"dataset": dataset, "path": path})
    full = Path(wanted).absolute()
    for name, root in roots.items():
        if full.is_relative_to(root):
            places.append({"dataset": name, "path": full.relative_to(root).as_posix()})
    rows = query(
        """
        SELECT * FROM samples
        WHERE path IN (SELECT unnest($1)) AND EXISTS (
                  SELECT 1 FROM (SELECT unnest($1) AS p, unnest($2) AS d) AS places
                  WHERE p = path AND (d = '' OR d = dataset))
           OR starts_with(sample_id, $3)
        ORDER BY dataset, path, crop_index LIMIT 1000
        """,
        [place["path"] for place in places],
        [place["dataset"] or "" for place in places],
        wanted if _PREFIX.fullmatch(wanted) else "no prefix",
        samples=workspace.samples.source(),
    )
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def _unknown(workspace: Workspace, wanted: str, roots: dict[str, Path]) -> str:
    """A message for a name that no sample has."""
    if any((root / wanted).is_file() or Path(wanted).is_file() for root in roots.values()):
        return (
            f"{wanted} is a file, but samples.parquet does not know it: run `omnigen-pipe "
            "discover` and `omnigen-pipe bucket`. If it stays unknown, it lies in no dataset's "
            "folder, or its name is not that of a picture."
        )
    similar = query(
        "SELECT DISTINCT dataset || ':' || path AS name FROM samples "
        "WHERE contains(lower(path), lower($1)) ORDER BY name LIMIT $2",
        Path(wanted).stem,
        _SIMILAR,
        samples=workspace.samples.source(),
    )["name"].to_pylist()
    hint = f" There is {', '.join(similar)}." if similar else ""
    return f"No sample has the id or path {wanted}.{hint}"


def _file(row: dict[str, Any], roots: dict[str, Path]) -> dict[str, Any]:
    """The file of a sample as it is now."""
    root = roots.get(row["dataset"])
    path = None if root is None else root / row["path"]
    try:
        facts = None if path is None else path.stat()
    except OSError:
        facts = None
    return {
        "path": None if path is None else str(path),
        "exists": facts is not None,
        "size": None if facts is None else facts.st_size,
        "mtime_ns": None if facts is None else facts.st_mtime_ns,
    }


def _images(
    workspace: Workspace, samples: list[dict[str, Any]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of images.parquet behind samples, by dataset and path."""
    found = query(
        "SELECT * EXCLUDE (captions) FROM images SEMI JOIN wanted USING (dataset, path)",
        images=workspace.images.source(),
        wanted=pa.Table.from_pylist(
            [{"dataset": row["dataset"], "path": row["path"]} for row in samples], schema=_FILES
        ),
    ).to_pylist()
    return {(row["dataset"], row["path"]): row for row in found}


def _geometry(row: dict[str, Any]) -> dict[str, Any]:
    names = ("bucket", "resize_width", "resize_height", "crop_left", "crop_top", "crop_index")
    return {name: row[name] for name in (*names, "pixels_key")}


def _known(
    workspace: Workspace, vae_key: str, keys: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """Those of the latents `keys` of the VAE `vae_key` that count, by pixels_key."""
    # Rows that say what is damaged name shards, whatever their keys.
    few = query(
        """
        SELECT * FROM latents
        WHERE status = 'damaged' OR pixels_key IN (SELECT unnest($1::VARCHAR[]))
        """,
        list(keys),
        latents=workspace.latents.source(),
    )
    known = current_latents(few, workspace.root, vae_key, locate=shard_paths(workspace.root))
    return {row["pixels_key"]: row for row in known.to_pylist()}


def _masks(workspace: Workspace, keys: list[str]) -> dict[str, dict[str, Any]]:
    """Those of the masks `keys` that count, by mask_key."""
    return _known(workspace, MASKS_KEY, keys) if keys else {}


def _mask(row: dict[str, Any], masks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The loss mask of a sample, and where its weights lie; None where it has none."""
    if row["mask_key"] is None:
        return None
    names = ("mask_path", "mask_hash", "mask_key")
    return {**{name: row[name] for name in names}, "weights": masks.get(row["mask_key"])}


def _prompts(
    workspace: Workspace, tokenizer_key: str, keys: list[str]
) -> dict[str, dict[str, Any]]:
    """Ids and length of the prompts `keys` of the tokenizer `tokenizer_key`, by prompt_key."""
    few = query(
        "SELECT * FROM prompts WHERE prompt_key IN (SELECT unnest($1::VARCHAR[]))",
        keys,
        prompts=workspace.prompts.source(),
    )
    known = current_prompts(few, tokenizer_key).to_pylist()
    names = ("tokenizer_key", "length", "input_ids")
    return {
        row["prompt_key"]: {name: row[name] for name in names}
        for row in known
        if row["status"] == "ok"
    }


def _runs(workspace: Workspace, sample_id: str) -> list[dict[str, Any]]:
    """For each run that has frozen the sample, the optimizer steps of its epoch that see it."""
    found: list[dict[str, Any]] = []
    for path in sorted(workspace.root.glob("runs/*/samples.arrow")):
        run = Run(path.parent.name, path.parent)
        try:
            frozen = FrozenSamples.open(path)
            start = run.start()
            checkpoint, passed_over = run.resume_point("latest")
        except PipeError as error:
            found.append({"run": run.name, "problem": str(error)})
            continue
        rows = np.flatnonzero(np.asarray(frozen.table["sample_id"]) == sample_id)
        if not len(rows):
            continue
        options = {k: v for k, v in start.settings.items() if k in TrainConfig.model_fields}
        config = TrainConfig.model_validate(options)
        epoch = checkpoint.position.epoch if checkpoint else 0
        order = frozen.order(epoch, config, start.micro_batches)
        before = epoch * len(order)
        places = np.flatnonzero(np.isin(order.samples, rows))
        micro = [int(np.flatnonzero((order.starts <= p) & (p < order.ends))[0]) for p in places]
        steps = sorted(before + m // order.micro_batches + 1 for m in micro)
        found.append({"run": run.name, "epoch": epoch, "steps": steps, "notes": passed_over})
    return found


def show(samples: list[dict[str, Any]]) -> None:
    """Print explanations for a person on stdout."""
    for number, sample in enumerate(samples):
        if number:
            print()
        for line in _lines(sample):
            print(line)


def _lines(sample: dict[str, Any]) -> list[str]:
    file, image, geometry = sample["file"], sample["image"], sample["geometry"]
    lines = [f"sample    {sample['sample_id']}  ({sample['dataset']}: {sample['path']})"]
    where = file["path"] or "out of reach"
    lines.append(f"file      {where}{'' if file['exists'] else '  (not there now)'}")
    if image is None:
        lines.append("image     no longer in images.parquet")
    else:
        changed = (file["size"], file["mtime_ns"]) != (image["size"], image["mtime_ns"])
        state = "  (changed since discover)" if file["exists"] and changed else ""
        lines.append(
            f"image     {image['content_hash']}  {image['format']} {image['width']}x"
            f"{image['height']} {image['mode']}, {image['size']} bytes{state}"
        )
    if sample["status"] != "ok":
        return [*lines, f"left out  {sample['status']}: {sample['reason']}"]
    lines.append(
        f"geometry  resize to {geometry['resize_width']}x{geometry['resize_height']}, crop at "
        f"({geometry['crop_left']}, {geometry['crop_top']}), bucket {geometry['bucket']}"
    )
    lines.append(f"          pixels_key {geometry['pixels_key']}")
    latent = sample["latent"]
    if latent is None:
        lines.append("latent    missing: run `omnigen-pipe encode-vae`")
    elif latent["status"] == "failed":
        lines.append(f"latent    failed: {latent['reason']}")
    else:
        lines.append(
            f"latent    {latent['shard']} at byte {latent['offset']}, {latent['nbytes']} bytes, "
            f"{latent['dtype']} {latent['shape']}"
        )
    if mask := sample["mask"]:
        lines.append(f"mask      {mask['mask_path'] or 'the alpha channel'}")
        weights = mask["weights"]
        where = "missing: run `omnigen-pipe encode-vae`"
        if weights is not None and weights["status"] == "ok":
            where = f"{weights['shard']} at byte {weights['offset']}"
        lines.append(f"          mask_key {mask['mask_key']}, {where}")
    for prompt in sample["prompts"]:
        ids = prompt["input_ids"]
        shown = "missing: run `omnigen-pipe tokenize`" if ids is None else f"{len(ids)} ids {ids}"
        lines.append(f"prompt    {prompt['text']!r}")
        lines.append(f"          prompt_key {prompt['prompt_key']}, {shown}")
    lines.append(f"batches   split {sample['split']}, {sample['repeats'] + 1} times an epoch")
    for run in sample["runs"]:
        if "problem" in run:
            lines.append(f"          run {run['run']}: {run['problem']}")
        else:
            steps = ", ".join(str(step) for step in run["steps"])
            lines.append(f"          run {run['run']}, epoch {run['epoch']}: step {steps}")
            lines += [f"            {sentence}" for sentence in run["notes"]]
    return lines
