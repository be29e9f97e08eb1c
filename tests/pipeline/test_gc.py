"""gc: what is needed stays, byte for byte; what is not goes, but never too early."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from pipeline_project import Project

import omnigen_pipe.maintenance.gc as collection
from manifests.lock import maintenance_lock
from manifests.views import current_latents
from omnigen_pipe.latents.shards import read_latent, shard_path
from omnigen_pipe.workspace import Workspace

DAY = 24 * 3600


def draw(folder: Path, *numbers: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        size = (96, 80) if number % 2 else (80, 112)
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")


@pytest.fixture
def here(project: Callable[..., Project], tmp_path: Path) -> Project:
    """A workspace of eight pictures, encoded in shards of two or so."""
    draw(tmp_path / "pictures", *range(8))
    made = project(tmp_path / "pictures", extra="[vae]\nvae_batch_size = 2\nshard_seconds = 1e-9")
    prepare(made)
    return made


def prepare(here: Project) -> None:
    for stage in ("discover", "bucket", "encode-vae"):
        here.run(stage, *(["--allow-shrink"] if stage == "discover" else []))


def edit(here: Project, old: str, new: str) -> None:
    path = here.root / "omnigen-pipe.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def gc(here: Project, *more: str, hours: float = 0) -> Any:
    return here.json("gc", "--yes", "--grace-hours", str(hours), *more)


def latents(here: Project) -> dict[tuple[str, str], np.ndarray]:
    """Every latent that counts, read by offset and checked."""
    place = Workspace.open(here.root)
    return {
        (row["pixels_key"], row["vae_key"]): read_latent(
            shard_path(place.root, row["shard"]),
            row["offset"],
            row["nbytes"],
            row["checksum"],
            tuple(row["shape"]),
            row["dtype"],
        )
        for row in current_latents(place.latents.source(), place.root).to_pylist()
        if row["status"] == "ok"
    }


def tars(here: Project) -> list[Path]:
    return sorted(here.root.glob("latents/*/*.tar"))


def files(here: Project) -> dict[str, tuple[int, int]]:
    paths = [p for p in sorted(here.root.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}


def equal(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_small_shards_are_packed_and_nothing_else_changes(here: Project) -> None:
    before, old = latents(here), tars(here)
    assert len(old) >= 4
    first = files(here)
    planned = here.json("gc")
    assert files(here) == first, "a dry run writes nothing"
    assert "by a gc 24 hours later" in " ".join(planned["notes"])
    done = gc(here)
    assert "deleted at once" in " ".join(done["notes"])
    for name in ("shards given up", "latents moved"):
        assert done["counts"][name] == planned["counts"][name] > 0
    assert equal(latents(here), before)
    assert len(tars(here)) == 2, "one for each bucket"
    assert not set(tars(here)) & set(old)
    assert here.json("encode-vae")["counts"]["encoded"] == 0
    found = {}
    for tar in tars(here):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            assert sample["json"]["pixels_key"] == sample["__key__"]
            found[sample["__key__"], sample["json"]["vae_key"]] = sample["moments.npy"]
    assert equal(found, before), "stock webdataset reads the packed shards"
    again = gc(here)
    assert not again["changed"]
    assert equal(latents(here), before)


def test_only_what_is_not_needed_goes(here: Project, tmp_path: Path) -> None:
    gc(here)
    before = latents(here)
    for number in (0, 1, 2, 3, 4, 5):  # six of eight: both shards fall under half
        (tmp_path / "pictures" / f"{number}.png").unlink()
    prepare(here)
    done = gc(here)
    assert done["counts"]["shards given up"] == 2
    assert done["counts"]["latents moved"] == 2
    after = latents(here)
    assert len(after) == 2
    assert equal(after, {key: before[key] for key in after})
    assert len(here.json("gc")["shards"]) == 0
    names = []
    for path in tars(here):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == 2 * 2
    log = Workspace.open(here.root).latents
    assert log.read().num_rows == 2, "the log forgets them too"


def test_a_shard_with_enough_in_use_stays(here: Project, tmp_path: Path) -> None:
    gc(here)
    (tmp_path / "pictures" / "0.png").unlink()
    prepare(here)
    old = tars(here)
    assert not gc(here)["changed"]
    assert tars(here) == old
    assert gc(here, "--live-share", "0.9")["counts"]["shards given up"] == 1


def test_what_a_run_has_frozen_stays(here: Project, tmp_path: Path) -> None:
    here.run("tokenize")
    here.run("train")
    needed = latents(here)
    edit(here, "resolution = 64", "resolution = 48")
    prepare(here)
    assert len(latents(here)) == 16
    gc(here)
    assert equal({k: v for k, v in latents(here).items() if k in needed}, needed)
    edit(here, "resolution = 48", "resolution = 64")
    edit(here, "max_train_steps = 4", "max_train_steps = 6")
    here.run("bucket")
    gc(here)
    assert equal(latents(here), needed), "and what no run and no setting needs is gone"
    assert here.json("train")["counts"]["steps"] == 6
    shutil.rmtree(here.root / "runs")
    edit(here, "resolution = 64", "resolution = 32")
    prepare(here)
    gc(here)
    assert not set(latents(here)) & set(needed)


def test_nothing_is_deleted_before_its_day(here: Project) -> None:
    old = tars(here)
    gc(here, hours=24)
    assert set(old) < set(tars(here)), "readers may still have looked them up"
    waiting = here.json("gc")
    assert waiting["bytes_waiting"] == sum(p.stat().st_size for p in old)
    assert waiting["counts"]["orphans deleted"] == 0
    # A day later: the tars' own age does not matter, the age of what replaced them does.
    for path in old:
        os.utime(path, (time.time() - 9 * DAY,) * 2)
    gc(here, hours=24)
    assert set(old) < set(tars(here))
    for path in (here.root / "manifests" / "latents").iterdir():
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    assert gc(here, hours=24)["counts"]["orphans deleted"] == len(old)
    assert not set(old) & set(tars(here))
    assert here.json("encode-vae")["counts"]["encoded"] == 0


def test_orphans_and_leftovers_go_by_their_age(here: Project) -> None:
    gc(here)
    (here.root / "staging").mkdir(exist_ok=True)
    young, old = (here.root / "latents" / "80x64" / f"{c * 32}.tar" for c in "ab")
    foreign = here.root / "latents" / "80x64" / "mine.tar"
    left = here.root / "staging" / "left.tar"
    folder = here.root / "staging" / "checkpoint"
    folder.mkdir()
    for path in (young, old, foreign, left, folder / "weights"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        if path != young:
            os.utime(path, (time.time() - 2 * DAY,) * 2)
    done = gc(here, hours=24)
    assert (done["counts"]["orphans deleted"], done["counts"]["unfinished files deleted"]) == (1, 1)
    assert [p.exists() for p in (young, old, foreign, left)] == [True, False, True, False]
    assert folder.exists(), "the folder itself is young"
    os.utime(folder, (time.time() - 2 * DAY,) * 2)
    gc(here, hours=24)
    assert not folder.exists()


def test_latents_of_a_disk_that_is_away_are_not_forgotten(here: Project) -> None:
    gc(here)
    before = latents(here)
    away = here.root.parent / "away"
    shutil.move(here.root / "latents", away)
    (here.root / "latents").mkdir()
    assert latents(here) == {}
    assert gc(here)["counts"]["shards given up"] == 0
    (here.root / "latents").rmdir()
    shutil.move(away, here.root / "latents")
    assert equal(latents(here), before)


def test_damage_is_not_carried_along(here: Project) -> None:
    place = Workspace.open(here.root)
    rows = current_latents(place.latents.source(), place.root).to_pylist()
    damaged = rows[0]
    path = here.root / damaged["shard"]
    data = bytearray(path.read_bytes())
    data[damaged["offset"]] ^= 1
    path.write_bytes(data)
    done = json.loads(here.run("gc", "--yes", "--grace-hours", "0", "--json", status=1).stdout)
    assert list(done["faults"]) == [damaged["shard"]]
    assert path.exists(), "nothing is thrown away before it is known to be elsewhere"
    assert "verify --repair" in " ".join(done["notes"])


def test_a_stale_workspace_and_a_busy_one_are_refused(here: Project) -> None:
    edit(here, "resolution = 64", "resolution = 48")
    assert "omnigen-pipe bucket" in here.run("gc", "--yes", status=1).stderr
    edit(here, "resolution = 48", "resolution = 64")
    with maintenance_lock(here.root / "manifests" / "maintenance.lock") as held:
        assert held
        assert "Another process" in here.run("gc", "--yes", status=1).stderr
        here.run("gc")
    here.run("gc", "--yes")


def test_a_torn_fragment_is_no_reason_to_delete_its_shards(here: Project) -> None:
    gc(here)
    fragment = Workspace.open(here.root).latents.merge_small()
    assert fragment is not None
    whole = fragment.read_bytes()
    for broken in (whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:], whole[:100]):
        fragment.write_bytes(broken)
        for path in here.root.rglob("*"):
            if path != fragment:
                os.utime(path, (time.time() - 2 * DAY,) * 2)
        for arguments in (("gc",), ("gc", "--yes", "--grace-hours", "0")):
            assert f"{fragment} is damaged" in here.run(*arguments, status=1).stderr
        assert any(fragment.name in note for note in here.json("status")["notes"])
    fragment.write_bytes(whole)
    assert len(latents(here)) == 8


def test_a_damaged_page_is_neither_merged_nor_believed(here: Project) -> None:
    here.run("tokenize")
    log = Workspace.open(here.root).latents
    fragment = log.fragments()[0]
    data = bytearray(fragment.read_bytes())
    data[60] ^= 1
    fragment.write_bytes(data)
    log.merge_small()
    assert fragment in log.fragments()
    for arguments in (("gc", "--yes"), ("train",)):
        assert f"{fragment} is damaged" in here.run(*arguments, status=1).stderr
    assert not list(here.root.glob("runs/*/samples.arrow"))


def test_what_a_run_freezes_meanwhile_comes_back(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.run("tokenize")
    needed = latents(here)
    edit(here, "resolution = 64", "resolution = 48")
    prepare(here)
    commit = collection._commit

    def freezing(*arguments: Any) -> None:
        edit(here, "resolution = 48", "resolution = 64")
        here.run("bucket")
        here.run("train")
        commit(*arguments)

    monkeypatch.setattr(collection, "_commit", freezing)
    assert gc(here)["counts"]["shards given up"] > 0
    assert equal({k: v for k, v in latents(here).items() if k in needed}, needed)
    monkeypatch.undo()
    gc(here)
    assert equal(latents(here), needed)
    edit(here, "max_train_steps = 4", "max_train_steps = 6")
    assert here.json("train")["counts"]["steps"] == 6


def test_damaged_json_is_not_carried_along(here: Project) -> None:
    path = tars(here)[0]
    data = path.read_bytes()
    place = data.index(b'"crop":[') + len(b'"crop":[')
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    done = json.loads(here.run("gc", "--yes", "--grace-hours", "0", "--json", status=1).stdout)
    assert list(done["faults"]) == [path.relative_to(here.root).as_posix()]
    assert path.exists()
    here.run("verify", status=1)
    here.run("verify", "--repair")
    assert here.json("encode-vae")["counts"]["encoded"] > 0
    gc(here)
    here.run("verify")
