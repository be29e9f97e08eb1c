"""Rubbish: files in the workspace that nothing names any more, and how long they have to wait."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from manifests.log import GRACE_SECONDS, Fragment
from manifests.query import Source, query
from omnigen_pipe.latents.shards import MASKS_FOLDER
from omnigen_pipe.workspace import Workspace

#: Shards as omnigen-pipe names them; other files are nobody's to delete.
_SHARD = re.compile(r"[0-9a-f]{32}\.tar")
_BUCKET = re.compile(rf"({MASKS_FOLDER})?\d+x\d+")


@dataclass(frozen=True)
class Rubbish:
    """Files that nothing needs: those old enough to be deleted, and those that must wait."""

    old: list[Path]
    young: list[Path]

    def old_bytes(self) -> int:
        """What deleting the old ones gives back."""
        return sum(map(_size, self.old))

    def young_bytes(self) -> int:
        """What the young ones take."""
        return sum(map(_size, self.young))


def orphans(workspace: Workspace, grace_seconds: float = GRACE_SECONDS) -> Rubbish:
    """The shards that the log does not name.

    One that only replaced fragments name waits until these may go; any other is old enough when
    it was written `grace_seconds` ago: until then its fragment may still be to come.
    """
    # The files before the log: whatever is published in between is then in both.
    shards = {
        path.relative_to(workspace.root).as_posix(): path
        for path in sorted(workspace.latents_folder.glob("*/*.tar"))
        if _SHARD.fullmatch(path.name) and _BUCKET.fullmatch(path.parent.name)
    }
    listing = workspace.latents.listing()
    named = _named(workspace, listing.current)
    spared = _named(
        workspace, [f for f in listing.replaced if not listing.may_go(f, grace_seconds)]
    )
    found = Rubbish([], [])
    for name, path in shards.items():
        if name not in named:
            waits = name in spared or _age(path) < grace_seconds
            (found.young if waits else found.old).append(path)
    return found


def _named(workspace: Workspace, fragments: list[Fragment]) -> set[str]:
    """The shards that `fragments` name."""
    rows = query(
        "SELECT DISTINCT shard FROM latents WHERE status = 'ok'",
        latents=Source(workspace.latents.manifest, lambda: [f.path for f in fragments]),
    )
    return set(rows["shard"].to_pylist())


def leftovers(workspace: Workspace, grace_seconds: float = GRACE_SECONDS) -> Rubbish:
    """What lies unfinished in `staging/`: old enough when nothing in it changed since."""
    found = Rubbish([], [])
    if workspace.staging.is_dir():
        for path in sorted(workspace.staging.iterdir()):
            (found.old if _age(path) >= grace_seconds else found.young).append(path)
    return found


def _age(path: Path) -> float:
    """Seconds since `path`, or anything in it, was changed; 0 for what is gone."""
    try:
        inner = path.rglob("*") if path.is_dir() else ()
        newest = max(float(one.lstat().st_mtime) for one in (path, *inner))
    except FileNotFoundError:  # finished and published meanwhile
        return 0.0
    return time.time() - newest


def delete(workspace: Workspace, grace_seconds: float) -> None:
    """Delete what is old enough. Shards go before the fragments that say since when."""
    for path in orphans(workspace, grace_seconds).old:
        path.unlink(missing_ok=True)
    for path in leftovers(workspace, grace_seconds).old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for log in (workspace.files, workspace.latents, workspace.prompts):
        log.sweep(grace_seconds)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(map(_size, path.iterdir()))
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
