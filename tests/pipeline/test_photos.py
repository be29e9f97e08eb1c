"""Real photographs through all five stages, and a second run that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipeline_project import Project
from safetensors.torch import load_file


def test_twelve_photographs_become_an_adapter_and_a_second_run_does_nothing(
    photos: Path, project: Callable[..., Project]
) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in photos.iterdir()}
    here = project(photos)
    discover, bucket, encode, tokenize, train = here.json("run", process=True)

    names = sorted(p.name for p in photos.glob("*.jpg"))
    assert len(names) == 12
    samples = pq.read_table(here.root / "manifests" / "samples.parquet")
    assert sorted(samples["path"].to_pylist()) == names
    assert set(samples["status"].to_pylist()) == {"ok"}
    assert samples["captions"].to_pylist() == [[Path(p).stem] for p in samples["path"].to_pylist()]
    assert discover["counts"]["images"] == 12
    assert encode["counts"]["encoded"] == 12
    assert train["counts"]["steps"] == 4
    assert all(part["changed"] for part in (discover, bucket, encode, tokenize, train))
    assert load_file(train["adapter"])

    again = here.json("run", process=True)
    assert [part["changed"] for part in again] == [False] * 5
    assert "no work was done" in here.run("run").stdout
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in photos.iterdir()} == before


def test_one_more_photograph_costs_one_of_everything(
    photos: Path, project: Callable[..., Project], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    sources = sorted(photos.glob("*.jpg"))
    for source in sources[:2]:
        (folder / source.name).symlink_to(source)
    here = project(folder)
    for stage in ("discover", "bucket", "encode-vae", "tokenize"):
        here.run(stage)
    (folder / sources[2].name).symlink_to(sources[2])
    assert here.json("discover")["counts"]["images"] == 3
    here.run("bucket")
    assert here.json("encode-vae")["counts"]["encoded"] == 1
    assert here.json("tokenize")["counts"]["tokenised"] == 1


@pytest.mark.slow
def test_photographs_at_two_resolutions_at_once(
    photos: Path, project: Callable[..., Project]
) -> None:
    second = f'[[dataset]]\nid = "large"\ninstance_data_dir = "{photos}"\nresolution = 128\n'
    here = project(photos, extra=second)
    train = here.json("run")[-1]
    assert train["counts"]["samples"] == 24
