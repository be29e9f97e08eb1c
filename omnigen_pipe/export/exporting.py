"""Exporting: an adapter's file and a base model in, a folder with the merged model out.

Tensor by tensor: read where it is stored, merged if the adapter changes it, rounded, written. So
memory holds one tensor and what merging it takes, however large the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from manifests.errors import PipeError, UsageError
from manifests.parquet import tool_version
from omnigen_pipe.export import weight_files
from omnigen_pipe.export.base import (
    Stored,
    check_needed,
    left_over,
    stored_tensors,
    whole_weights_files,
)
from omnigen_pipe.export.folder import (
    check_room,
    check_target,
    copy_files,
    leftovers,
    published,
    write_marker,
)
from omnigen_pipe.export.layouts import Layout, Target, beyond_authors, phi3_config, targets
from omnigen_pipe.export.merged import DTYPES, Merged, short
from omnigen_pipe.export.report import leftover_notes, survival_notes
from omnigen_pipe.export.weight_files import Entry
from omnigen_pipe.model.lokr import read_adapter
from omnigen_pipe.model.merging import by_weight, read_deltas
from omnigen_pipe.model.provenance import Provenance, read_provenance
from omnigen_pipe.model_files import Model, transformer_config
from omnigen_pipe.progress import Progress
from omnigen_pipe.stop import Stopped, stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.weights import WEIGHTS_NAME, weights_key
from omnigen_pipe.workspace import Workspace

#: The parts of the base that each layout needs, besides the transformer.
_OTHER_PARTS: dict[Layout, tuple[str, ...]] = {
    "diffusers": ("vae", "tokenizer", "scheduler"),
    "omnigen": ("vae", "tokenizer"),
}
#: Files that lie beside the parts of a model in diffusers' layout; not every model has both.
_BESIDE = ("model_index.json", "generation.json")
#: Bytes of a weight file in diffusers' layout, unless `--max-shard-size` says something else.
DEFAULT_LIMIT = 5 * 10**9


@dataclass(frozen=True)
class _Work:
    """What is to be written: the base's `parts` and files `beside` them, by their folders and
    paths; `plan` says which tensors, and what each is made of; the configuration does not know
    the `unknown` ones."""

    layout: Layout
    parts: Mapping[str, Path]
    beside: Sequence[Path]
    vae_weights: Sequence[Path]
    config: Mapping[str, Any]
    unknown: Sequence[str]
    plan: Mapping[Entry, Target]
    merged: Merged
    limit: int


def run(
    adapter: Path,
    output: Path,
    progress: Progress,
    *,
    base: Model,
    workspace: Workspace | None = None,
    layout: Layout = "diffusers",
    dtype: str | None = None,
    strength: float = 1.0,
    limit: int | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Merge the adapter file `adapter` into the model `base` and publish the result as the folder
    `output`.

    `workspace` may remember the hashes of the base's weights, `dtype` is one of `DTYPES` (None: as
    stored), `limit` the bytes of a weight file in diffusers' layout; with `any_base` the base may
    be another than the adapter was trained on. Raises `UsageError` where adapter, model and folder
    do not go together, `PipeError` where one of their files is damaged, a number does not fit
    `dtype` or the disk has no room.
    """
    if not math.isfinite(strength):
        raise UsageError(f"--strength {strength}: give a finite number.")
    if layout == "omnigen" and limit is not None:
        raise UsageError("--max-shard-size does not go with --layout omnigen: that is one file.")
    folder = output.expanduser().resolve()
    check_target(folder, overwrite)
    base = base.pinned()
    work = _work(adapter, base, layout, DTYPES[dtype] if dtype else None, strength, limit)
    if any(part.resolve().is_relative_to(folder) for part in work.parts.values()):
        raise UsageError(f"{folder} holds the base model itself. Give another folder.")
    check_room(folder, _size(work))
    origin = read_provenance(adapter)
    key = weights_key(work.parts["transformer"], workspace, remember=False)
    said = _check_base(origin, base, key, any_base)
    left = leftovers(folder)
    total = sum(len(target.parts) for target in work.plan.values())
    with stop_on_signal() as request:
        try:
            with (
                published(folder, overwrite) as unfinished,
                progress.task("Merging", total) as advance,
            ):

                def done(name: str) -> None:
                    request.obey()
                    advance(1, name)

                files = _write(unfinished, work, done)
                facts = {
                    "layout": layout,
                    "adapter": origin.file,
                    "adapter_step": origin.step,
                    "adapter_blake3": origin.blake3,
                    "strength": strength,
                    "base": base.label,
                    "revision": None if base.is_local else base.revision,
                    "vae": base.vae and Model(base.vae, base.start).label,
                    "transformer_key": key,
                    "trained_on": origin.base,
                    "dtype": _dtype_name(work.plan),
                    **work.merged.figures(),
                    "omnigen_pipe_version": tool_version(),
                }
                write_marker(unfinished, facts)
        except Stopped as stopped:
            summary = Summary("export", changed=False, unchanged="", signal=stopped.signal)
            summary.notes.append("Stopped: nothing was written.")
            return summary

    summary = Summary("export", changed=True)
    summary.counts = {
        "modules merged": facts["modules"] if work.merged.worst is not None else 0,
        "tensors": len(work.plan),
        "weight files": files,
    }
    summary.details = {"folder": str(folder), **facts}
    summary.notes = [
        *said,
        *survival_notes(work.merged, facts["dtype"]),
        *_base_notes(work),
        *leftover_notes(left),
        f"Wrote {folder}",
    ]
    return summary


def _work(
    adapter: Path,
    base: Model,
    layout: Layout,
    dtype: torch.dtype | None,
    strength: float,
    limit: int | None,
) -> _Work:
    """What is to be written, once it is known that `adapter` and `base` are whole and fit."""
    tensors, metadata = read_adapter(adapter)
    deltas = read_deltas(tensors, f"The adapter {adapter}")
    parts = {part: base.part(part) for part in ("transformer", *_OTHER_PARTS[layout])}
    check_needed(parts)
    stored = stored_tensors(parts["transformer"])
    config = transformer_config(parts["transformer"])
    unknown = left_over(parts["transformer"], stored, config)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    changes = by_weight(deltas, shapes, f"The adapter {adapter}")
    return _Work(
        layout=layout,
        parts=parts,
        beside=[path for name in _BESIDE if (path := base.beside(name)) is not None],
        vae_weights=whole_weights_files(parts["vae"]),
        config=config,
        unknown=unknown,
        plan=_plan(targets(layout, stored), stored, dtype),
        merged=Merged(stored, changes, strength * _trained_strength(adapter, metadata)),
        limit=limit or DEFAULT_LIMIT,
    )


def _trained_strength(path: Path, metadata: Mapping[str, str]) -> float:
    """The multiplier that the adapter computed with in training; 1 where its file does not say.

    Nothing else of the configuration is needed, so other programs' may hold more than ours.
    """
    try:
        found = json.loads(metadata.get("lycoris_config", "{}")).get("multiplier", 1.0)
        if isinstance(found, bool) or not math.isfinite(found):
            raise ValueError(f"its multiplier is {found}")
        return float(found)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise PipeError(
            f"{path} does not say how strong it was in training: the lycoris_config in its "
            f"metadata is damaged ({error})."
        ) from error


def _check_base(origin: Provenance, base: Model, key: str, any_base: bool) -> list[str]:
    """Sentences on the adapter and whether `base`, whose weights have the key `key`, is the one it
    was trained on; raises `UsageError` where it is not, unless `any_base`."""
    said = [f"Adapter: {origin.label}"]
    mismatch = origin.mismatch(base.label, key)
    if mismatch is not None and not any_base:
        raise UsageError(
            f"{mismatch} Name its own base with --model, or merge all the same with --any-base."
        )
    if mismatch is not None:
        said.append(mismatch)
    elif origin.transformer_key is None:
        said.append(
            "Its file does not say on which base it was trained: it is not known whether that was "
            f"{base.label}."
        )
    return said


def _base_notes(work: _Work) -> list[str]:
    """What the readers of the layout must know of the base."""
    said = beyond_authors(work.config) if work.layout == "omnigen" else []
    if work.layout == "diffusers" and "model_index.json" not in {p.name for p in work.beside}:
        said.append(
            "The base has no model_index.json: the parts can be loaded, a whole pipeline cannot."
        )
    if work.unknown:
        said.append(
            f"The base holds {len(work.unknown)} tensors that its config.json does not know, such "
            f"as {work.unknown[0]}: they were copied, and readers will pass over them."
        )
    return said


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


def _write(folder: Path, work: _Work, done: Callable[[str], object]) -> int:
    """Write everything but the marker into `folder`; returns the number of weight files.

    `done` is called with each tensor of the base that is finished.
    """

    def rows(entry: Entry) -> Iterator[torch.Tensor]:
        for name in work.plan[entry].parts:
            yield work.merged.tensor(name, entry.dtype)
            done(name)

    for inner, files in _copies(work).items():
        copy_files(files, folder / inner)
    if work.layout == "omnigen":
        text = json.dumps(phi3_config(work.config, _common(work.plan)), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        weight_files.write(folder / "model.safetensors", list(work.plan), rows)
        return 1
    own = folder / "transformer"
    split = weight_files.split(work.plan, work.limit)
    named = dict(zip(weight_files.file_names(len(split)), split, strict=True))
    for name, entries in named.items():
        weight_files.write(own / name, entries, rows)
    if len(named) > 1:
        weight_files.write_index(own / f"{WEIGHTS_NAME}.index.json", named)
    return len(named)


def _copies(work: _Work) -> dict[str, list[Path]]:
    """The files that are copied as they are, by the folder within the export."""
    parts = work.parts
    vae = {"vae": [*sorted(parts["vae"].glob("*.json")), *work.vae_weights]}
    if work.layout == "omnigen":
        tokenizer = _small_files(parts["tokenizer"])
        return {**vae, "": [file for file in tokenizer if file.name != "config.json"]}
    small = {part: _small_files(parts[part]) for part in ("tokenizer", "scheduler")}
    return {
        **vae,
        **small,
        "": [*work.beside],
        "transformer": [parts["transformer"] / "config.json"],
    }


def _small_files(folder: Path) -> list[Path]:
    """A tokenizer's or scheduler's files; nothing that would have to be unpickled."""
    ends = (".json", ".model", ".txt")
    return sorted(p for p in folder.iterdir() if p.suffix in ends and p.is_file())


def _size(work: _Work) -> int:
    """Bytes that the export takes at least."""
    copied = sum(file.stat().st_size for files in _copies(work).values() for file in files)
    return copied + sum(entry.nbytes for entry in work.plan)


def _common(plan: Iterable[Entry]) -> str | None:
    """torch's name of the dtype that all tensors have; None where they have several."""
    kinds = {entry.dtype for entry in plan}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def _dtype_name(plan: Iterable[Entry]) -> str:
    """The dtypes of the export's tensors, as `--dtype` has them."""
    return " and ".join(sorted({short(entry.dtype) for entry in plan}))
