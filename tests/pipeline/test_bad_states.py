"""States that a workspace can get into, and what every command makes of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipeline_project import Project

from manifests.schema import SCHEMA_VERSION
from omnigen_pipe.workspace import Workspace

STAGES = ("discover", "bucket", "encode-vae", "tokenize")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Path:
    """A workspace of three pictures with all but the training done. Do not change it."""
    root = tmp_path_factory.mktemp("states") / "w"
    (root / "pictures").mkdir(parents=True)
    for number in range(3):
        image = Image.radial_gradient("L").rotate(30 * number).resize((80, 80)).convert("RGB")
        path = root / "pictures" / f"picture {number}.png"
        image.save(path)
        os.utime(path, (1_600_000_000, 1_600_000_000))
    (root / "omnigen-pipe.toml").write_text(
        f'[model]\npretrained_model_name_or_path = "{small_omnigen}"\n[[dataset]]\nid = "main"\n'
        'instance_data_dir = "pictures"\nresolution = 64\naspect_bucket_alignment = 16\n'
        '[train]\nmax_train_steps = 1\nreport_to = "none"\n'
    )
    for stage in STAGES:
        Project(root).run(stage)
    return root


@pytest.fixture
def here(tmp_path: Path, done: Path) -> Project:
    shutil.copytree(done, tmp_path / "w")
    return Project(tmp_path / "w")


def work(here: Project) -> dict[str, int]:
    """Run the stages; how much each made anew."""
    summaries = [here.json(stage) for stage in STAGES]
    names = ("files opened", "samples", "encoded", "tokenised")
    return {n: s["counts"][n] for n, s in zip(names, summaries, strict=True) if n != "samples"}


def check_well(here: Project) -> None:
    """Nothing is left to do, nothing is damaged, and training runs."""
    assert work(here) == {"files opened": 0, "encoded": 0, "tokenised": 0}
    here.run("status")
    here.run("verify")
    here.run("gc")
    assert here.json("train")["counts"] == {"samples": 3, "steps": 1, "steps now": 1}


def test_an_empty_manifests_folder(here: Project) -> None:
    shutil.rmtree(here.root / "manifests")
    (here.root / "manifests").mkdir()
    here.run("status")
    here.run("verify")
    assert "omnigen-pipe bucket" in here.run("gc", status=1).stderr
    assert "omnigen-pipe bucket" in here.run("train", status=1).stderr
    assert work(here) == {"files opened": 3, "encoded": 3, "tokenised": 6}
    here.run("gc", "--yes", "--grace-hours", "0")
    assert len(list(here.root.glob("latents/*/*.tar"))) == 1, "the old tars were orphans"
    check_well(here)


def test_foreign_files_are_named_and_do_no_harm(here: Project) -> None:
    manifests = here.root / "manifests"
    for folder in (manifests, *(manifests / name for name in ("files", "latents", "prompts"))):
        pq.write_table(pa.table({"x": [1]}), folder / "foreign.parquet")
        (folder / "notes.txt").write_text("hello")
        (folder / "garbage.parquet").write_text("no table")
    notes = " ".join(here.json("status")["notes"])
    assert all(f"manifests/{name}" in notes for name in ("files", "latents", "prompts"))
    assert "foreign.parquet is not a manifest" in " ".join(here.json("verify")["notes"])
    check_well(here)
    assert (manifests / "latents" / "foreign.parquet").exists()


@pytest.mark.parametrize("name", ["images", "samples"])
def test_a_foreign_snapshot_is_refused(here: Project, name: str) -> None:
    path = here.root / "manifests" / f"{name}.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    for command in ("encode-vae", "status", "gc", "bucket" if name == "images" else "tokenize"):
        text = here.run(command, status=1).stderr
        assert f"{path} is not a manifest of omnigen-pipe. Move it away" in text
    path.unlink()
    check_well(here)


def test_a_fragment_whose_tar_is_gone(here: Project) -> None:
    for tar in here.root.glob("latents/*/*.tar"):
        tar.unlink()
    assert here.json("status")["stages"][2]["missing"] == 3
    assert here.json("verify", status=1)["counts"]["damaged latents"] == 3
    assert "omnigen-pipe encode-vae" in here.run("train", status=1).stderr
    assert work(here) == {"files opened": 0, "encoded": 3, "tokenised": 0}
    here.run("verify", "--repair")
    check_well(here)


def test_a_tar_whose_fragment_is_gone(here: Project) -> None:
    for fragment in (here.root / "manifests" / "latents").iterdir():
        fragment.unlink()
    here.run("verify")
    assert here.json("status")["stages"][2]["missing"] == 3
    assert work(here) == {"files opened": 0, "encoded": 3, "tokenised": 0}
    check_well(here)
    done = here.json("gc", "--yes", "--grace-hours", "0")
    assert done["counts"]["orphans deleted"] == 1


@pytest.mark.parametrize("name", ["files", "images", "samples", "latents", "prompts"])
def test_a_manifest_of_a_newer_version_is_refused(here: Project, name: str) -> None:
    place = Workspace.open(here.root)
    if name in ("images", "samples"):
        path = getattr(place, name).path
    else:
        path = getattr(place, name).fragments()[0]
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    metadata[b"omnigen_pipe.schema_version"] = str(SCHEMA_VERSION + 1).encode()
    metadata[b"omnigen_pipe.tool_version"] = b"9.9.9"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    readers = {
        "files": ("discover", "status"),
        "images": ("discover", "bucket", "encode-vae", "tokenize", "status", "gc", "train"),
        "samples": ("bucket", "encode-vae", "tokenize", "status", "gc", "train"),
        "latents": ("encode-vae", "status", "gc", "train"),
        "prompts": ("tokenize", "status", "train"),
    }
    before = path.read_bytes()
    for command in (*readers[name], "verify"):
        text = here.run(command, status=1).stderr
        assert "Upgrade omnigen-pipe to at least 9.9.9" in text, command
    assert path.read_bytes() == before
