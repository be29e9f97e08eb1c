"""status: where the workspace stands, and what a run would do. It changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.log import MERGE_AT
from omnigen_pipe.images.survey import Survey, survey
from omnigen_pipe.maintenance import standing
from omnigen_pipe.maintenance.rubbish import leftovers, orphans
from omnigen_pipe.maintenance.standing import Standing
from omnigen_pipe.progress import Progress
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Status:
    """The standing of every stage, and sentences on the workspace itself."""

    workspace: str
    stages: list[Standing]
    notes: list[str]

    @property
    def up_to_date(self) -> bool:
        """Whether a run would find nothing to do."""
        return not any(stage.missing for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """A machine-readable form."""
        return {
            "workspace": self.workspace,
            "up_to_date": self.up_to_date,
            "stages": [stage.as_json() for stage in self.stages],
            "notes": self.notes,
        }


def run(workspace: Workspace, progress: Progress, quick: bool = False) -> Status:
    """Look at everything, the image folders too unless `quick`.

    Raises `UsageError` and `PipeError` where the configuration or a manifest cannot be used.
    """
    if quick:
        found = Survey(workspace.images.source())
    else:
        progress.note("status: looking at the image folders")
        found = survey(workspace)
    discover = standing.of_discover(workspace, found)
    progress.note("status: comparing manifests")
    bucket, samples = standing.of_bucket(workspace, found.images)
    stages = [
        discover,
        bucket,
        standing.of_encode_vae(workspace, samples, found.images),
        standing.of_tokenize(workspace, samples),
        standing.of_train(workspace, samples),
    ]
    notes = [*found.notes, *_notes(workspace)]
    if found.unread:
        notes.append(
            f"{found.unread:,} files are not read yet: what they need of the later stages is not "
            "counted."
        )
    return Status(str(workspace.root), stages, notes)


def _notes(workspace: Workspace) -> list[str]:
    """What there is to say about logs and files."""
    notes = []
    for log in (workspace.files, workspace.latents, workspace.prompts):
        listing = log.listing()
        name = log.manifest.name
        if listing.foreign:
            notes.append(
                f"manifests/{name}: {len(listing.foreign)} files are no manifests of omnigen-pipe "
                f"and are ignored, such as {listing.foreign[0].name}."
            )
        if listing.torn:
            notes.append(
                f"manifests/{name}: {len(listing.torn)} fragments are damaged and what they held "
                f"does not count, such as {listing.torn[0].name}. Restore them, or move them away "
                f"and run `omnigen-pipe {log.manifest.stage}`."
            )
        if len(listing.current) > MERGE_AT:
            notes.append(
                f"manifests/{name}: {len(listing.current):,} fragments; the next "
                f"{log.manifest.stage} merges them."
            )
    files = [orphans(workspace), leftovers(workspace)]
    old = sum(rubbish.old_bytes() for rubbish in files)
    if old:
        notes.append(f"`omnigen-pipe gc` could delete {old:,} bytes that nothing names.")
    return notes


def show(status: Status) -> None:
    """Print a status for a person on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None)
    table.add_column("stage")
    for heading in ("current", "missing", "failed", "no longer used"):
        table.add_column(heading, justify="right")
    table.add_column("of")
    for stage in status.stages:
        numbers = (stage.current, stage.missing, stage.failed, stage.unused)
        table.add_row(stage.stage, *(f"{number:,}" for number in numbers), stage.unit)
    console.print(table)
    for stage in status.stages:
        for why in stage.why:
            console.print(f"  {stage.stage}: {why}", markup=False)
        if stage.unused_bytes:
            console.print(f"  {stage.stage}: {stage.unused_bytes:,} bytes are no longer used")
        cost = ", ".join(f"{number:,} {name}" for name, number in stage.cost.items() if number)
        if cost:
            console.print(f"  {stage.stage} would cost: {cost}", markup=False)
    for note in status.notes:
        console.print(f"  {note}", markup=False)
    if status.up_to_date:
        console.print("Everything is up to date: `omnigen-pipe run` would do nothing.")
