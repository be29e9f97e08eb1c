"""Exporting: an adapter's file and a base model in, a folder with the merged model out.

Tensor by tensor: read where it is stored, merged if the adapter changes it, rounded, written. So
memory holds one tensor and what merging it takes, however large the model is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from pydantic import ValidationError

from manifests.errors import PipeError, UsageError
from manifests.parquet import tool_version
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.export import report, weight_files
from omnigen_pipe.export.base import (
    Base,
    Stored,
    base_of,
    named,
    stored_tensors,
    transformer_config,
)
from omnigen_pipe.export.folder import (
    check_target,
    leftovers,
    published,
    write_marker,
)
from omnigen_pipe.export.layouts import Layout, Target, phi3_config, targets
from omnigen_pipe.export.merged import DTYPES, Merged, short
from omnigen_pipe.export.weight_files import Entry
from omnigen_pipe.model.lokr import read_adapter
from omnigen_pipe.model.merging import by_weight, read_deltas
from omnigen_pipe.progress import Advance, Progress
from omnigen_pipe.stop import StopRequest, stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.weights import WEIGHTS_NAME, weights_files
from omnigen_pipe.workspace import Workspace

#: The parts of the base that each layout needs, besides the transformer.
_OTHER_PARTS: dict[Layout, tuple[str, ...]] = {
    "diffusers": ("vae", "tokenizer", "scheduler"),
    "omnigen": ("vae", "tokenizer"),
}
#: Bytes of a weight file in diffusers' layout, unless `--max-shard-size` says something else.
DEFAULT_LIMIT = 5 * 10**9


class _StoppedError(Exception):
    """A signal asked to leave; nothing is published."""


@dataclass(frozen=True)
class _Work:
    """What is to be written: `plan` says which tensors, and what each is made of."""

    layout: Layout
    base: Base
    config: Mapping[str, Any]
    plan: Mapping[Entry, Target]
    merged: Merged
    limit: int


def run(
    adapter: Path,
    output: Path,
    progress: Progress,
    *,
    workspace: Path,
    model: str | None = None,
    layout: Layout = "diffusers",
    dtype: str | None = None,
    strength: float = 1.0,
    limit: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Merge the adapter file `adapter` into the model `model`, or that of the workspace, and
    publish the result as the folder `output`.

    `dtype` is one of `DTYPES` (None: as stored), `limit` the bytes of a weight file in diffusers'
    layout. Raises `UsageError` where adapter, model and folder do not go together, `PipeError`
    where one of their files is damaged or a number does not fit `dtype`.
    """
    if not math.isfinite(strength):
        raise UsageError(f"--strength {strength}: give a finite number.")
    if layout == "omnigen" and limit is not None:
        raise UsageError("--max-shard-size does not go with --layout omnigen: that is one file.")
    folder = output.expanduser().resolve()
    check_target(folder, overwrite)
    tensors, metadata = read_adapter(adapter)
    deltas = read_deltas(tensors)
    factor = strength * _trained_strength(adapter, metadata)

    parts = ("transformer", *_OTHER_PARTS[layout])
    if model is None:
        base = base_of(Workspace.open(workspace), parts)
    else:
        base = named(model, parts, start=Path.cwd())
    if any(part.resolve().is_relative_to(folder) for part in base.parts.values()):
        raise UsageError(f"{folder} holds the base model itself. Give another folder.")
    stored = stored_tensors(base.parts["transformer"])
    changes = by_weight(deltas, {name: tensor.shape for name, tensor in stored.items()})
    plan = _plan(targets(layout, stored), stored, DTYPES[dtype] if dtype else None)
    config = transformer_config(base.parts["transformer"])
    work = _Work(
        layout, base, config, plan, Merged(stored, changes, factor), limit or DEFAULT_LIMIT
    )
    left = leftovers(folder)
    total = sum(len(target.parts) for target in plan.values())
    with stop_on_signal() as request:
        try:
            with (
                published(folder, overwrite) as unfinished,
                progress.task("Merging", total) as advance,
            ):
                files = _write(unfinished, work, _Watch(advance, request))
                facts = {
                    "layout": layout,
                    "adapter": adapter.name,
                    "adapter_blake3": blake3(adapter.read_bytes()).hexdigest(),
                    "strength": strength,
                    "base": base.name,
                    "revision": base.revision,
                    "dtype": _dtype_name(plan),
                    **work.merged.figures(),
                    "omnigen_pipe_version": tool_version(),
                }
                write_marker(unfinished, facts)
        except _StoppedError:
            summary = Summary("export", changed=False, unchanged="", signal=request.signal)
            summary.notes.append("Stopped: nothing was written.")
            return summary

    summary = Summary("export", changed=True)
    summary.counts = {"modules merged": len(changes), "tensors": len(plan), "weight files": files}
    summary.details = {"folder": str(folder), **facts}
    summary.notes = report.notes(work.merged, facts["dtype"], base, layout, config, left)
    summary.notes.append(f"Wrote {folder}")
    return summary


def _trained_strength(path: Path, metadata: Mapping[str, str]) -> float:
    """The multiplier that the adapter computed with in training; 1 where its file does not say."""
    if "lycoris_config" not in metadata:
        return 1.0
    try:
        return LokrConfig.model_validate_json(metadata["lycoris_config"]).multiplier
    except ValidationError as error:
        raise PipeError(
            f"{path} does not say how it is to be attached: its metadata is damaged."
        ) from error


def _plan(
    wanted: Iterable[Target], stored: Mapping[str, Stored], dtype: torch.dtype | None
) -> dict[Entry, Target]:
    """The tensors to write, with what each is made of."""
    plan = {}
    for target in wanted:
        parts = [stored[name] for name in target.parts]
        rows, rest = sum(part.shape[0] for part in parts if part.shape), parts[0].shape[1:]
        if len(parts) > 1 and any(part.shape[1:] != rest for part in parts):
            raise UsageError(f"{' and '.join(target.parts)} do not have the same width.")
        shape = parts[0].shape if len(parts) == 1 else (rows, *rest)
        own = reduce(torch.promote_types, (part.dtype for part in parts))
        plan[Entry(target.name, dtype or own, shape)] = target
    return plan


class _Watch:
    """Says how far the work is, and ends it where a signal asked for that."""

    def __init__(self, advance: Advance, request: StopRequest) -> None:
        self._advance, self._request = advance, request

    def done(self, name: str) -> None:
        """One tensor of the base is done."""
        if self._request.signal is not None:
            raise _StoppedError
        self._advance(1, name)


def _write(folder: Path, work: _Work, watch: _Watch) -> int:
    """Write everything but the marker into `folder`; returns the number of weight files."""

    def parts(entry: Entry) -> Iterable[torch.Tensor]:
        for name in work.plan[entry].parts:
            yield work.merged.tensor(name, entry.dtype)
            watch.done(name)

    base = work.base.parts
    _copy([*sorted(base["vae"].glob("*.json")), *weights_files(base["vae"])], folder / "vae")
    if work.layout == "omnigen":
        text = json.dumps(phi3_config(work.config, _common(work.plan)), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        _copy([f for f in _small_files(base["tokenizer"]) if f.name != "config.json"], folder)
        weight_files.write(folder / "model.safetensors", list(work.plan), parts)
        return 1
    _copy(work.base.beside, folder)
    for part in ("tokenizer", "scheduler"):
        _copy(_small_files(base[part]), folder / part)
    own = folder / "transformer"
    _copy([base["transformer"] / "config.json"], own)
    split = weight_files.split(work.plan, work.limit)
    files = dict(zip(weight_files.file_names(len(split)), split, strict=True))
    for name, entries in files.items():
        weight_files.write(own / name, entries, parts)
    if len(files) > 1:
        weight_files.write_index(own / f"{WEIGHTS_NAME}.index.json", files)
    return len(files)


def _small_files(folder: Path) -> list[Path]:
    """A tokenizer's or scheduler's files; nothing that would have to be unpickled."""
    ends = (".json", ".model", ".txt")
    return sorted(p for p in folder.iterdir() if p.suffix in ends and p.is_file())


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _common(plan: Iterable[Entry]) -> str | None:
    """torch's name of the dtype that all tensors have; None where they have several."""
    kinds = {entry.dtype for entry in plan}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def _dtype_name(plan: Iterable[Entry]) -> str:
    """The dtypes of the export's tensors, as `--dtype` has them."""
    return " and ".join(sorted({short(entry.dtype) for entry in plan}))
