"""The report of a workspace: samples and aggregates, however many images there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import PipeError
from manifests.query import query
from omnigen_pipe.images.samples import changed_since_bucket
from omnigen_pipe.images.sources import reachable_roots
from omnigen_pipe.latents.wanted import (
    STATUS_COLUMNS,
    known_latents,
    wanted_latents,
    with_status,
)
from omnigen_pipe.progress import Progress
from omnigen_pipe.report import decoded, left_out, likeness, shapes, sheets, words
from omnigen_pipe.report.model_here import ModelHere, model_here
from omnigen_pipe.report.page import MOST_PICTURE_BYTES, check_output, publish, render_report
from omnigen_pipe.report.thumbnails import Album
from omnigen_pipe.settings import listed
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: The file that is written unless another is named.
NAME = "inspect.html"
#: Pictures of the same look and of equal bytes may take so much of the room, sheets the rest.
_FOR_COPIES = MOST_PICTURE_BYTES // 4
#: So many reasons of failed latents are shown.
_FAILURES = 20


@dataclass(frozen=True)
class Options:
    """What a report shows: `samples` per bucket on contact sheets, `decoded` latents, at most
    `hash_limit` images that are compared by their looks; all of them drawn with `seed`."""

    samples: int = 8
    decoded: int = 4
    hash_limit: int = 5_000
    seed: int = 0


@dataclass(frozen=True)
class Latents:
    """How many latents are wanted, and of these there, failed and missing; `failures` are reasons
    with their number. `key_known` is false where the VAE is not on this machine, or unusable."""

    wanted: int
    there: int
    failed: int
    missing: int
    failures: list[dict[str, Any]]
    key_known: bool


def write(
    workspace: Workspace,
    progress: Progress,
    options: Options,
    output: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
) -> Summary:
    """Write the report of `workspace` to `output`, by default `inspect.html` in its root.

    Raises `PipeError` where discover has not run, and `UsageError` where `output` holds something
    else.
    """
    if not workspace.images.exists():
        raise PipeError(
            f"There is no {workspace.images.path}: run `omnigen-pipe discover` first, or "
            "`omnigen-pipe run` for all stages."
        )
    output = output or workspace.root / NAME
    check_output(output, overwrite)
    roots = reachable_roots(workspace)
    progress.note("inspect: counting")
    accounts = left_out.left_out(workspace)
    forms = shapes.shapes(workspace)
    here = model_here(workspace)
    captions = words.words(workspace, options.seed, here.keys.tokenizer)
    latents = _latents(workspace, here.keys.vae)
    progress.note("inspect: drawing contact sheets")
    album = Album(MOST_PICTURE_BYTES - _FOR_COPIES)
    cards = sheets.draw(workspace, roots, album, options.samples, options.seed, here.keys)
    if "vae" in here.problems and options.decoded:
        pairs = decoded.unusable(here.problems["vae"])
    else:
        pairs = decoded.compare(workspace, progress, roots, album, cards, options.decoded, device)
    copies = likeness.likeness(
        workspace, progress, roots, Album(_FOR_COPIES), options.hash_limit, options.seed
    )
    notes = _notes(workspace, here, cards)
    page = render_report(
        "workspace.html.jinja",
        workspace,
        title=f"{workspace.root.name or 'Workspace'}: images",
        notes=notes,
        options=options,
        left_out=accounts,
        splits={dataset.id: dataset.split for dataset in workspace.config.datasets},
        shapes=forms,
        sheets=cards,
        latents=latents,
        decoded=pairs,
        words=captions,
        likeness=copies,
        alike=(likeness.DISTANCE, likeness.MOST_DIFFERENCE),
        most_counted=words.MOST_COUNTED,
        bucketed=workspace.samples.exists(),
    )
    size = publish(page, output, workspace.staging)
    return Summary(
        "inspect",
        changed=True,
        counts={
            "images": accounts.images,
            "used": accounts.total("used"),
            "filtered": accounts.total("filtered"),
            "rejected": accounts.total("rejected"),
            "waiting": accounts.total("waiting"),
            "latents": latents.there,
            "pictures shown": sum(card.uri is not None for card in cards.cards),
            "images compared": copies.hashed,
            "bytes written": size,
        },
        notes=[*notes, *_leaks(copies), f"Written to {output}"],
        details={
            "output": str(output),
            "causes": accounts.causes,
            "other_causes": accounts.others,
            "psnr_db": pairs.mean,
            "decoded": [{"image": p.name, "psnr_db": p.psnr} for p in pairs.pairs],
            "duplicates": {
                name: {
                    "groups": kind.number,
                    "surplus": kind.surplus,
                    "leaking": kind.leaking,
                    "leaking_groups": _files(kind),
                }
                for name, kind in (("same_bytes", copies.same), ("look_alike", copies.near))
            },
            "different_images": copies.pictures,
            "captions": captions.captions,
            "empty_captions": captions.empty,
        },
    )


def _notes(workspace: Workspace, here: ModelHere, cards: sheets.Sheets) -> list[str]:
    """What a reader of the page must know of it."""
    notes = []
    for part, what in (("vae", "latents"), ("tokenizer", "tokens")):
        if part in here.problems:
            notes.append(f"Of {what} nothing is known: {here.problems[part]}")
    if not workspace.samples.exists():
        notes.append(
            "`omnigen-pipe bucket` has not run: of buckets, crops, latents and copies nothing is "
            "known yet."
        )
    elif changed := changed_since_bucket(workspace):
        notes.append(
            f"The configuration has changed since `omnigen-pipe bucket` ran ({listed(changed)}): "
            "shown is what it made then."
        )
    if cards.refused:
        notes.append(f"{cards.refused:,} images of contact sheets found no room on the page.")
    return notes


def _leaks(copies: likeness.Likeness) -> list[str]:
    found = []
    for number, one, many in (
        (copies.same.leaking, "is trained on as well", "are trained on as well"),
        (copies.near.leaking, "looks like one that is trained on", "look like ones trained on"),
    ):
        if number:
            found.append(f"{number:,} evaluated image{f' {one}' if number == 1 else f's {many}'}.")
    return found


def _files(copies: likeness.Copies) -> list[list[dict[str, str]]]:
    """The files of the groups that leak, as far as the page names them."""
    return [
        [{"dataset": m.dataset, "path": m.path, "split": m.split} for m in group.members]
        for group in copies.groups
        if group.leaks
    ]


def _latents(workspace: Workspace, key: str | None) -> Latents:
    """The latents of the VAE `key`."""
    wanted = wanted_latents(workspace.samples.source())
    if key is None or not wanted.num_rows:
        return Latents(wanted.num_rows, 0, 0, wanted.num_rows, [], key is not None)
    latents = with_status(wanted, known_latents(workspace, key, STATUS_COLUMNS))
    rows = query(
        "SELECT status, split_part(reason, ': ', 1) AS reason, count(*) AS n FROM latents "
        "GROUP BY ALL ORDER BY n DESC, reason",
        latents=latents,
    ).to_pylist()

    def total(status: str | None) -> int:
        return sum(row["n"] for row in rows if row["status"] == status)

    failures = [row for row in rows if row["status"] == "failed"][:_FAILURES]
    return Latents(wanted.num_rows, total("ok"), total("failed"), total(None), failures, True)
