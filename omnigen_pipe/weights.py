"""The weight files of a model's part: which they are, and the hashes that name them.

Gigabytes are hashed once and remembered by path, size and modification time. Imports no torch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from manifests.publish import publishing
from omnigen_pipe.mtimes import RACY_NS
from omnigen_pipe.workspace import Workspace

#: diffusers' name of the weights in a part's folder; an index beside it where they are split.
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def weights_files(folder: Path) -> list[Path]:
    """The safetensors that diffusers loads from `folder`: the index's shards, or the one file."""
    single, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(listed.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} is not an index of weights: {error}") from error
    if single.is_file():
        return [single]
    raise UsageError(f"There is no {WEIGHTS_NAME} in {folder}. Weights are read from it only.")


def weights_hashes(workspace: Workspace, files: list[Path], remember: bool = True) -> list[str]:
    """BLAKE3 of each file, taken from memory where size and modification time are the same.

    New ones are written down in `manifests/weights.json` if `remember`.
    """
    remembered_in = workspace.root / "manifests" / "weights.json"
    remembered = _remembered(remembered_in)
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
        from blake3 import blake3

        digest = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        hashes.append(digest)
        if time.time_ns() - stat.st_mtime_ns >= RACY_NS:
            remembered[str(file.resolve())] = [*identity, digest]
            learned = True
    if learned and remember:
        text = json.dumps(remembered, indent=1, sort_keys=True) + "\n"
        with publishing(workspace.staging, remembered_in) as path:
            path.write_text(text, encoding="utf-8")
    return hashes


def _remembered(path: Path) -> dict[str, Any]:
    """The hashes remembered in `path`; none where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
