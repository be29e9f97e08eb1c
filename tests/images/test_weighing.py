"""Weighing masks: few are decoded ahead, and what fails keeps nothing alive."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3
from PIL import Image

from manifests.errors import UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.images import weighing
from omnigen_pipe.images.originals import ChangedSourceError
from omnigen_pipe.images.pixels import PixelsError
from omnigen_pipe.images.weighing import MaskItem, mask_items, weigh
from omnigen_pipe.workspace import Workspace


def item(folder: Path, number: int) -> MaskItem:
    """An item with its mask of noise, written as `number`.png."""
    path = folder / f"{number}.png"
    noise = np.random.default_rng(number).integers(0, 256, (32, 48), np.uint8)
    Image.fromarray(noise).save(path)
    mask_hash = blake3(path.read_bytes()).hexdigest()[:32]
    size = (48, 32)
    return MaskItem(
        path.name, f"{number:032x}", mask_hash, "greyscale", size, size, (0, 0), (path,)
    )


def test_look_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many masks wait, also where they are made as they are asked for."""
    asked, started, lock = 0, 0, threading.Lock()
    read_original = weighing.read_original

    def items() -> Iterable[MaskItem]:
        nonlocal asked
        for number in range(60):
            asked += 1
            yield item(tmp_path, number)

    def counted(paths: list[Path], content_hash: str) -> bytes:
        nonlocal started
        with lock:
            started += 1
        return read_original(paths, content_hash)

    monkeypatch.setattr(weighing, "read_original", counted)
    monkeypatch.setattr(weighing, "usable_cores", lambda: 2)
    weighed = weigh(items())
    for taken in range(1, 11):
        thing, weights = next(weighed)
        assert thing.name == f"{taken - 1}.png"
        assert isinstance(weights, np.ndarray)
        assert started <= asked <= taken + 2 * 2 + 1  # that of the next file tells where one ends
    weighed.close()
    assert asked <= 10 + 2 * 2 + 1


def test_what_cannot_be_weighed_keeps_no_mask_alive(tmp_path: Path) -> None:
    broken, changed = item(tmp_path, 0), item(tmp_path, 1)
    whole = broken.paths[0].read_bytes()
    broken.paths[0].write_bytes(whole[: len(whole) // 2])
    changed.paths[0].write_bytes(whole)
    cut = blake3(broken.paths[0].read_bytes()).hexdigest()[:32]
    items = [MaskItem(**{**vars(broken), "mask_hash": cut}), changed]
    results = [result for _, result in weigh(items)]
    assert [type(result) for result in results] == [PixelsError, ChangedSourceError]
    for result in results:
        assert isinstance(result, Exception)
        assert (result.__traceback__, result.__cause__, result.__context__) == (None, None, None)


def test_masks_to_be_weighed_are_made_as_they_are_asked_for(tmp_path: Path) -> None:
    """And a folder that is gone is said at once, before anything is written."""
    option = {"id": "a", "instance_data_dir": "photos", "mask": "alpha"}
    workspace = Workspace(tmp_path, parse({"dataset": [option]}, "test"))
    columns: dict[str, list[Any]] = {
        "dataset": ["a"] * 3,
        "path": [f"{n}.png" for n in range(3)],
        "mask_path": [None] * 3,
        "mask_key": [f"{n:032x}" for n in range(3)],
        "mask_hash": [f"{n:032x}" for n in range(3)],
        "bucket": ["48x32"] * 3,
        "resize_width": [48] * 3,
        "resize_height": [32] * 3,
        "crop_left": [0] * 3,
        "crop_top": [0] * 3,
        "status": ["ok"] * 3,
    }
    samples = pa.table({name: pa.array(values) for name, values in columns.items()})
    keys = samples.select(["mask_key"])
    with pytest.raises(UsageError, match="photos"):
        mask_items(workspace, samples, keys)
    (tmp_path / "photos").mkdir()
    items = mask_items(workspace, samples, keys)
    assert iter(items) is items
    made = list(items)
    assert [item.name for item in made] == ["a: 0.png", "a: 1.png", "a: 2.png"]
    assert made[1].paths == (tmp_path / "photos" / "1.png",)
    assert list(mask_items(workspace, samples, keys.slice(0, 0))) == []
