"""What a workspace holds in effect: what its readers see, during a run and after it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from manifests import parquet
from manifests.log import Log
from manifests.views import current_files, current_latents, current_prompts
from omnigen_pipe.latents.shards import read_latent
from omnigen_pipe.workspace import Workspace

#: How far latents of one image may lie apart where they were encoded in different batches.
RTOL, ATOL = 1e-3, 1e-5


#: Seconds between two looks of a reader, which otherwise leaves no time to the writers.
_PAUSE = 0.05


@dataclass(frozen=True)
class Effect:
    """What counts: the facts of each log by key, and the rows of each snapshot."""

    files: dict[tuple[Any, ...], tuple[Any, ...]]
    images: pa.Table
    samples: pa.Table
    latents: dict[str, np.ndarray]
    prompts: dict[str, tuple[int, ...]]


def effect(root: Path) -> Effect:
    """What the readers of the workspace `root` see now; every latent is read and checked."""
    place = Workspace.open(root)
    latents: dict[str, np.ndarray] = {}
    # A query takes time, and many looks are taken.
    rows = current_latents(place.latents.source(), root) if _any(place.latents) else pa.table({})
    for row in rows.to_pylist():
        assert row["status"] == "ok", row
        assert row["pixels_key"] not in latents, "it counts twice"
        latents[row["pixels_key"]] = read_latent(
            root / row["shard"],
            row["offset"],
            row["nbytes"],
            row["checksum"],
            tuple(row["shape"]),
            row["dtype"],
        )
    files = current_files(place.files.source()).to_pylist() if _any(place.files) else []
    prompts = current_prompts(place.prompts.source()).to_pylist() if _any(place.prompts) else []
    key = place.files.manifest.key
    return Effect(
        files={
            tuple(row[name] for name in key): (row["content_hash"], row["width"], row["status"])
            for row in files
        },
        images=place.images.read(),
        samples=place.samples.read(),
        latents=latents,
        prompts={row["prompt_key"]: tuple(row["input_ids"]) for row in prompts},
    )


def _any(log: Log) -> bool:
    return any(log.folder.glob("*.parquet"))


def check_equal(
    one: Effect, other: Effect, same_batch: Callable[[str], bool] = lambda key: True
) -> None:
    """Fail unless the two are one: to the byte, but for latents whose batches were not the same."""
    assert one.files == other.files
    assert one.images.equals(other.images)
    assert one.samples.equals(other.samples)
    assert one.prompts == other.prompts
    assert one.latents.keys() == other.latents.keys()
    for key, latent in one.latents.items():
        if same_batch(key):
            assert latent.tobytes() == other.latents[key].tobytes(), key
        else:
            np.testing.assert_allclose(latent, other.latents[key], RTOL, ATOL)


def check_growing(before: Effect, after: Effect) -> None:
    """Fail where the logs lost something between two looks, or a fact became another."""
    assert before.files.items() <= after.files.items()
    assert before.prompts.items() <= after.prompts.items()
    assert before.latents.keys() <= after.latents.keys()


def check_nothing_twice(root: Path) -> None:
    """Fail where a log holds a key twice: what was published was done again."""
    place = Workspace.open(root)
    for log in (place.files, place.latents, place.prompts):
        rows = log.read().select(list(log.manifest.key)).to_pylist()
        keys = [tuple(row.values()) for row in rows]
        assert len(keys) == len(set(keys)), log.folder


def leftovers(root: Path) -> tuple[list[Path], list[Path]]:
    """The unfinished files in `staging/`, and the tars that no fragment names."""
    place = Workspace.open(root)
    named = set(place.latents.read()["shard"].to_pylist())
    tars = [p for p in root.glob("latents/*/*") if p.relative_to(root).as_posix() not in named]
    return list((root / "staging").glob("*")), tars


def check_whole(root: Path) -> None:
    """Fail where a file in a place of manifests is not a whole one."""
    for path in (root / "manifests").rglob("*.parquet"):
        assert parquet.damage(path) is None, path


class Reader:
    """Looks at a workspace over and over while it is written to, in a thread of its own.

    Leaving it fails where a look found an error, or less than the look before.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._look, name="reader")
        #: Looks taken so far.
        self.looks = 0

    def _look(self) -> None:
        try:
            before = effect(self._root)
            while not self._stop.is_set():
                now = effect(self._root)
                check_growing(before, now)
                before = now
                self.looks += 1
                self._stop.wait(_PAUSE)
        except Exception as error:  # noqa: BLE001 - raised again where the test sees it
            self._error = error

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise AssertionError("a reader met an error") from self._error
