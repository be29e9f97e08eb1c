"""estimate: what training in this workspace will need of a GPU's memory. It changes nothing.

Needs neither a GPU nor weights, and takes what the workspace already knows: its buckets once
`bucket` has run, its longest prompt once `tokenize` has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from manifests.errors import UsageError
from manifests.query import query
from omnigen_pipe.config import (
    MAX_BUCKET_SIDE,
    MIN_ALIGNMENT,
    Config,
    TrainConfig,
    square_side,
)
from omnigen_pipe.images.buckets import tally
from omnigen_pipe.memory.estimate import (
    GIB,
    PARTS,
    Estimate,
    Prospect,
    image_tokens,
    offered_bytes,
    prospect,
)
from omnigen_pipe.memory.skeleton import architecture
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.library import dropout_prompt
from omnigen_pipe.prompts.template import prompt_key
from omnigen_pipe.workspace import Workspace

#: Tokens of the longest prompt where none is tokenised yet: the template and about a paragraph.
ASSUMED_PROMPT_TOKENS = 256
#: Batches that are always listed.
_BATCHES = 8
#: Buckets shown to a person, largest first; all are in the JSON.
_SHOWN_BUCKETS = 5


@dataclass(frozen=True)
class Report:
    """Estimates for the configured batch in each bucket, and for every batch in the largest.

    `samples` counts the samples of each bucket, where known. `offered` is what the card gives,
    bytes; `largest_batch` is 0 where not even one sample fits.
    """

    train: TrainConfig
    buckets: list[Estimate]
    batches: list[Estimate]
    samples: dict[str, int]
    vram: float
    offered: int
    largest_batch: int
    notes: list[str]

    @property
    def configured(self) -> Estimate:
        """The largest bucket at the configured batch: the peak of the run."""
        return self.buckets[0]

    def as_json(self) -> dict[str, Any]:
        """A machine-readable form; memory in bytes, `vram` in GiB."""
        return {
            "settings": _settings(self.train),
            "configured": self.configured.as_json(),
            "fits": self.configured.total <= self.offered,
            "vram": self.vram,
            "offered": self.offered,
            "largest_batch": self.largest_batch,
            "batches": [estimate.as_json() for estimate in self.batches],
            "buckets": [
                {"samples": self.samples.get(estimate.bucket), **estimate.as_json()}
                for estimate in self.buckets
            ],
            "notes": self.notes,
        }


def run(
    workspace: Workspace,
    progress: Progress,
    vram: float,
    resolution: int | None = None,
    batch: int | None = None,
) -> Report:
    """Estimate for the workspace's buckets, or for the square of `resolution` pixels a side.

    `vram`: GiB of the card; `batch`: instead of train_batch_size. Raises `UsageError` where the
    configuration or the model folder is not usable, `ManifestError` where a manifest is damaged.
    """
    config = workspace.config
    train = (
        config.train
        if batch is None
        else config.train.model_copy(update={"train_batch_size": batch})
    )
    samples, notes = _buckets(workspace, resolution)
    prompt_tokens, said = _longest_prompt(workspace)
    notes.append(said)
    ordered = sorted(samples, key=lambda bucket: (-image_tokens(bucket), bucket))
    progress.note("estimate: tracing a step by its shapes, which takes some seconds")
    ahead = prospect(architecture(workspace), train, workspace.lokr(), ordered, prompt_tokens)

    offered = offered_bytes(vram)
    configured = train.train_batch_size
    batches = sorted({*range(1, _BATCHES + 1), configured})
    report = Report(
        train,
        [ahead.estimate(bucket, configured) for bucket in ordered],
        [ahead.estimate(ordered[0], number) for number in batches],
        {bucket: number for bucket, number in samples.items() if number},
        vram,
        offered,
        ahead.largest_batch(ordered[0], offered),
        notes,
    )
    if report.configured.total > offered:
        notes.append(_advice(report))
    return report


def _buckets(workspace: Workspace, resolution: int | None) -> tuple[dict[str, int], list[str]]:
    """The buckets that are trained on with their samples (0: not known), and where from."""
    if resolution is not None:
        side = round(resolution / MIN_ALIGNMENT) * MIN_ALIGNMENT
        if not MIN_ALIGNMENT <= side <= MAX_BUCKET_SIDE:
            raise UsageError(
                f"--resolution {resolution}: a side is {MIN_ALIGNMENT} to {MAX_BUCKET_SIDE} pixels."
            )
        return {f"{side}x{side}": 0}, ["The bucket is the square that --resolution names."]
    if workspace.samples.exists():
        found: Counter[str] = Counter()
        for entry in tally(workspace.samples.source()):
            if entry["split"] != "eval":
                found[entry["bucket"]] += entry["samples"]
        if found:
            return dict(found), ["Buckets are those of samples.parquet."]
    sides = _square_sides(workspace.config)
    note = (
        "Buckets are not known before `omnigen-pipe bucket`: taken are the squares of the "
        "configured resolutions. Others have up to about as many pixels."
    )
    return {f"{side}x{side}": 0 for side in sides}, [note]


def square_prospect(workspace: Workspace) -> tuple[str, Prospect]:
    """The largest square bucket that is configured, and what estimates for it are made of.

    For a workspace in which neither `bucket` nor `tokenize` has run. Raises `UsageError` as `run`
    does.
    """
    side = max(_square_sides(workspace.config))
    bucket = f"{side}x{side}"
    shapes, train = architecture(workspace), workspace.config.train
    ahead = prospect(shapes, train, workspace.lokr(), [bucket], ASSUMED_PROMPT_TOKENS)
    return bucket, ahead


def _square_sides(config: Config) -> set[int]:
    """Sides of the square buckets that the configured datasets have, in pixels."""
    trained = [dataset for dataset in config.datasets if dataset.dataset_type != "eval"]
    sides = {square_side(dataset) for dataset in trained} or {square_side(config.defaults)}
    if not all(MIN_ALIGNMENT <= side <= MAX_BUCKET_SIDE for side in sides):
        raise UsageError(
            "A configured `resolution` has no square bucket: its side would be "
            f"{', '.join(map(str, sorted(sides)))} px, and must be {MIN_ALIGNMENT} to "
            f"{MAX_BUCKET_SIDE}."
        )
    return sides


def _longest_prompt(workspace: Workspace) -> tuple[int, str]:
    """Tokens of the longest prompt that is trained on, and a sentence on where that is from."""
    longest = None
    if workspace.prompts.fragments() and workspace.samples.exists():
        rows = query(
            """
            WITH trained AS (
                SELECT unnest(prompt_keys) AS prompt_key FROM samples
                WHERE status = 'ok' AND split <> 'eval'
                UNION SELECT $1
            )
            SELECT max(length) AS longest FROM prompts SEMI JOIN trained USING (prompt_key)
            WHERE status = 'ok'
            """,
            prompt_key(dropout_prompt(workspace.config)),
            prompts=workspace.prompts.source(),
            samples=workspace.samples.source(),
        )
        longest = rows["longest"][0].as_py()
    if longest is not None:
        return int(longest), f"The longest prompt has {longest} tokens, and all count as such."
    assumed = ASSUMED_PROMPT_TOKENS
    return assumed, f"No prompt is tokenised yet: {assumed} tokens each are assumed."


def _settings(train: TrainConfig) -> dict[str, Any]:
    """What the estimate depends on, by the configuration's names."""
    return {
        "train_batch_size": train.train_batch_size,
        "gradient_checkpointing": train.gradient_checkpointing,
        "mixed_precision": train.mixed_precision,
        "base_model_precision": train.base_model_precision,
        "optimizer": train.optimizer,
        "use_ema": train.use_ema,
    }


def _advice(report: Report) -> str:
    """What to change, where the configured batch does not fit."""
    settings = _settings(report.train)
    steps = []
    if not settings["gradient_checkpointing"]:
        steps.append("set gradient_checkpointing = true")
    if report.largest_batch:
        steps.append(f"lower train_batch_size to {report.largest_batch}")
    if settings["base_model_precision"] == "no_change":
        steps.append("quantise the base with base_model_precision")
    steps += ["lower `resolution`", "take FeedForward out of target_module"]
    return f"It does not fit. What helps, first things first: {'; '.join(steps)}."


def show(report: Report) -> None:
    """Print a report for a person on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    peak = report.configured
    settings = ", ".join(
        f"{name} {str(value).lower()}" for name, value in _settings(report.train).items()
    )
    console.print(f"estimate: {_gib(peak.total)} GiB at {peak.batch} x {peak.bucket}", markup=False)
    console.print(f"  {settings}", markup=False)

    parts = Table(box=None)
    parts.add_column("part")
    parts.add_column("GiB", justify="right")
    for part in PARTS:
        if getattr(peak, part):
            parts.add_row(_MEANING[part], _gib(getattr(peak, part)))
    parts.add_row("total", _gib(peak.total))
    console.print(parts)

    if len(report.buckets) > 1:
        buckets = Table(box=None)
        for heading in ("bucket", "samples", "activations", "total"):
            buckets.add_column(heading, justify="left" if heading == "bucket" else "right")
        for estimate in report.buckets[:_SHOWN_BUCKETS]:
            number = report.samples.get(estimate.bucket)
            count = f"{number:,}" if number else "?"
            numbers = (_gib(estimate.activations), _gib(estimate.total))
            buckets.add_row(estimate.bucket, count, *numbers)
        console.print(f"  A batch of {peak.batch} in each bucket, GiB:", markup=False)
        console.print(buckets)
        more = len(report.buckets) - _SHOWN_BUCKETS
        if more > 0:
            console.print(f"  and {more} smaller ones; --json has all.", markup=False)

    batches = Table(box=None)
    for heading in ("batch", "activations", "total", f"fits {report.vram:g} GB"):
        batches.add_column(heading, justify="right")
    for estimate in report.batches:
        fits = "yes" if estimate.total <= report.offered else "no"
        numbers = (_gib(estimate.activations), _gib(estimate.total))
        batches.add_row(str(estimate.batch), *numbers, fits)
    console.print(f"  Other batches of {peak.bucket}, GiB:", markup=False)
    console.print(batches)
    console.print(
        f"  Largest batch of {peak.bucket} on a card of {report.vram:g} GB, which offers about "
        f"{_gib(report.offered)} GiB: {report.largest_batch or 'none'}.",
        markup=False,
    )
    for note in report.notes:
        console.print(f"  {note}", markup=False)
    console.print("  Traced, not measured. Context and fragmentation are assumed.", markup=False)


_MEANING = {
    "weights": "weights (frozen base)",
    "adapter": "adapter (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer state",
    "ema": "EMA (float32)",
    "activations": "activations",
    "unpacked": "quantised weights, unpacked",
    "context": "context, fragmentation (assumed)",
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
