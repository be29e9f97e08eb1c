"""The README's way from a folder of pictures to an adapter, as a new user types it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from pipeline_project import Project


def test_five_lines_make_an_adapter_and_show_it(tmp_path: Path, small_omnigen: Path) -> None:
    cats = tmp_path / "pictures" / "cats"
    cats.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (96, 96), (80 * number, 10, 30)).save(cats / f"{number}.png")
        (cats / f"{number}.txt").write_text(f"cat {number}\nthe cat called {number}\n")
    here = Project(tmp_path)
    here.run(
        "init", "my-project", "--images", str(cats), "--caption-strategy", "textfile",
        "--model", str(small_omnigen), "--resolution", "64", "--max-train-steps", "2",
    )  # fmt: skip
    project = Project(tmp_path / "my-project")
    summaries = project.json("run")
    assert summaries[-1]["counts"] == {"samples": 3, "steps": 2, "steps now": 2}
    assert summaries[-1]["loss"] > 0
    report = project.json("inspect", "runs/default")
    assert report["metadata"]["step"] == "2"
    assert len(report["modules"]) == 12
    for path in (Path(report["path"]), Path(report["path"]).parent):
        assert project.json("inspect", str(path))["parameters"] == report["parameters"]
    shown = project.run("inspect", "runs/default").stdout
    assert "layers_1_self_attn_to_out_0 " in shown
    project.run(
        "generate", "a cat on a sofa", "--adapter", "runs/default", "-o", "cat.png",
        "--size", "64x64", "--steps", "2",
    )  # fmt: skip
    with Image.open(project.root / "cat.png") as cat:
        assert (cat.size, cat.info["adapter"]) == ((64, 64), "adapter.safetensors")
    assert "no whole checkpoint" in project.run("inspect", "manifests", status=2).stderr
