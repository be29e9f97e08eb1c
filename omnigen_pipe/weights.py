"""The weight files of a model's part: which they are, and the hashes that name them.

Gigabytes are hashed once and remembered by path, size and modification time. Imports no torch.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from manifests.keys import key
from manifests.publish import publishing
from omnigen_pipe.mtimes import RACY_NS
from omnigen_pipe.workspace import Workspace

#: diffusers' name of the weights in a part's folder; an index beside it where they are split.
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
#: Bytes that are hashed at once.
_CHUNK = 1 << 24
#: Of a file in the index's own folder.
_PLAIN_NAME = re.compile(r"[^/\\:]+\.safetensors")


def weights_files(folder: Path) -> list[Path]:
    """The safetensors that diffusers loads from `folder`: the index's shards, or the one file.

    Raises `UsageError` where there are none, or where the index names files that are no weights of
    this folder: it may be a stranger's, and what it names is read and copied.
    """
    single, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
            if foreign := [name for name in names if not _PLAIN_NAME.fullmatch(name)]:
                raise ValueError(f"it names {foreign[0]!r}, which is no safetensors file beside it")
            return [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} is not an index of weights: {error}") from error
    if single.is_file():
        return [single]
    raise UsageError(f"There is no {WEIGHTS_NAME} in {folder}. Weights are read from it only.")


def weights_key(folder: Path, workspace: Workspace | None, remember: bool = True) -> str:
    """A key of the weights in `folder`, by `weights_hashes`."""
    return key(*weights_hashes(workspace, weights_files(folder), remember))


def weights_hashes(
    workspace: Workspace | None, files: list[Path], remember: bool = True
) -> list[str]:
    """BLAKE3 of each file, taken from memory where size and modification time are the same.

    New ones are written down in `manifests/weights.json` if `remember`; without a workspace there
    is no memory.
    """
    remembered_in = workspace.root / "manifests" / "weights.json" if workspace else None
    remembered = _remembered(remembered_in) if remembered_in else {}
    hashes, learned = [], False
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError as error:
            raise UsageError(f"{file} is gone. Fetch the model again.") from error
        identity = [stat.st_size, stat.st_mtime_ns]
        entry = remembered.get(str(file.resolve()))
        if isinstance(entry, list) and entry[:2] == identity and len(entry) == 3:
            hashes.append(str(entry[2]))
            continue
        digest = _hash(file)
        hashes.append(digest)
        if time.time_ns() - stat.st_mtime_ns >= RACY_NS:
            remembered[str(file.resolve())] = [*identity, digest]
            learned = True
    if workspace and remembered_in and learned and remember:
        text = json.dumps(remembered, indent=1, sort_keys=True) + "\n"
        with publishing(workspace.staging, remembered_in) as path:
            path.write_text(text, encoding="utf-8")
    return hashes


def _hash(file: Path) -> str:
    """BLAKE3 of a file. Not by mapping it: of an export, memory is to stay near one tensor."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO)
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
    return str(hasher.hexdigest())


def _remembered(path: Path) -> dict[str, Any]:
    """The hashes remembered in `path`; none where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
