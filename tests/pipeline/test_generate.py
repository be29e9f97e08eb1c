"""`omnigen-pipe generate` as it is typed: what it writes, says, and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline_project import Project
from safetensors.torch import load_file, save_file

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT

FAST = ("--size", "48x32", "--steps", "2", "--device", "cpu")


@pytest.fixture
def here(tmp_path: Path, small_omnigen: Path) -> Project:
    """An empty folder beside a model that is called `omnigen`; no workspace."""
    (tmp_path / "omnigen").symlink_to(small_omnigen)
    return Project(tmp_path)


@pytest.fixture(scope="module")
def adapter(small_omnigen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an adapter that changes much."""
    config = LokrConfig()
    device = torch.device("cpu")
    transformer = load_transformer(small_omnigen / "transformer", torch.float32, device)
    network = lokr.attach(transformer, config, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    lokr.save_adapter(lokr.weights(network), path, config)
    return path


def pixels(path: Path | str) -> bytes:
    with Image.open(path) as opened:
        return opened.convert("RGB").tobytes()


def test_one_picture_says_how_it_was_made(here: Project, adapter: Path) -> None:
    ended = here.run(
        "generate", "a red circle", "--model", "omnigen", "-o", "out.png", *FAST,
        "--guidance", "3", "--seed", "7", "--adapter", str(adapter), "--strength", "0.5",
        "--negative-prompt", "blurry",
    )  # fmt: skip
    assert f"Wrote {here.root / 'out.png'}" in ended.stdout
    assert "Loading omnigen on cpu" in ended.stderr
    with Image.open(here.root / "out.png") as picture:
        assert picture.size == (48, 32)
        said = dict(picture.info)
    assert said.pop("software").startswith("omnigen-pipe ")
    assert said == {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "seed": "7",
        "steps": "2",
        "guidance": "3",
        "size": "48x32",
        "model": "omnigen",
        "adapter": "adapter.safetensors",
        "strength": "0.5",
    }
    assert str(here.root).encode() not in (here.root / "out.png").read_bytes()


def test_the_same_command_draws_the_same_picture_in_any_batch(here: Project) -> None:
    prompts = ("a red circle", "a blue square on a white background")
    draws = ("generate", *prompts, "--model", "omnigen", *FAST, "--count", "2", "--quiet")
    first = here.json(*draws, "-o", "one")
    again = here.json(*draws, "-o", "two", "--batch-size", "3")
    assert [Path(p["path"]).name for p in first["pictures"]] == [
        "a-red-circle-0.png",
        "a-red-circle-1.png",
        "a-blue-square-on-a-white-background-0.png",
        "a-blue-square-on-a-white-background-1.png",
    ]
    assert first["counts"] == {"pictures": 4}
    assert (first["model"], first["adapter"], first["precision"]) == ("omnigen", None, "float32")
    assert first["negative_prompt"] == DIFFUSERS_NEGATIVE_PROMPT
    for one, two in zip(first["pictures"], again["pictures"], strict=True):
        pairs = zip(pixels(one["path"]), pixels(two["path"]), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1
    later = here.json("generate", prompts[0], "--model", "omnigen", *FAST, "--seed", "1")
    (single,) = later["pictures"]
    assert Path(single["path"]).parent == here.root / "generated"
    assert pixels(single["path"]) == pixels(first["pictures"][1]["path"])


def test_nothing_is_overwritten_unless_told(here: Project) -> None:
    draw = ("generate", "a", "--model", "omnigen", *FAST, "-o", "out.png")
    (here.root / "out.png").write_bytes(b"mine")
    ended = here.run(*draw, status=2)
    assert "--overwrite" in ended.stderr
    assert (here.root / "out.png").read_bytes() == b"mine"
    here.run(*draw, "--overwrite")
    assert pixels(here.root / "out.png")


def test_in_a_folder_names_that_are_taken_get_a_number(here: Project) -> None:
    draw = ("generate", "a cat", "--model", "omnigen", *FAST)
    paths = [here.json(*draw, *more)["pictures"][0]["path"] for more in ((), (), ("--overwrite",))]
    assert [Path(path).name for path in paths] == ["a-cat-0.png", "a-cat-0-2.png", "a-cat-0.png"]
    assert len(list((here.root / "generated").iterdir())) == 2


def test_a_library_and_a_grid(here: Project) -> None:
    library = here.root / "library.json"
    library.write_text(json.dumps({"Cat": "a cat", "dog/brown": "a brown dog"}))
    draw = ("generate", "--model", "omnigen", "--prompt-library", "library.json", *FAST)
    report = here.json(*draw, "--count", "3", "--grid", "grid.png", "-o", "pictures")
    assert sorted(p.name for p in (here.root / "pictures").iterdir()) == [
        *(f"Cat-{seed}.png" for seed in range(3)),
        *(f"dog-brown-{seed}.png" for seed in range(3)),
    ]
    assert report["grid"] == str(here.root / "grid.png")
    with Image.open(here.root / "grid.png") as sheet:
        wide, tall = sheet.size
    assert wide == 3 * (128 + 8) + 8, "a prompt in each row"
    plain = here.json(*draw, "--count", "3", "--grid", "plain.jpg", "--no-captions")
    assert [entry["path"] for entry in plain["pictures"]] == [None] * 6
    assert not (here.root / "generated").exists()
    with Image.open(here.root / "plain.jpg") as sheet:
        assert sheet.size == (3 * (48 + 8) + 8, 2 * (32 + 8) + 8)
        assert sheet.height < tall


def test_an_adapter_counts_by_its_strength(here: Project, adapter: Path) -> None:
    draw = ("generate", "a red circle", "--model", "omnigen", *FAST)
    with_it = (*draw, "--adapter", str(adapter))
    for name, command in {
        "base": draw,
        "none": (*with_it, "--strength", "0"),
        "full": with_it,
        "half": (*with_it, "--strength", "0.5"),
    }.items():
        here.run(*command, "-o", f"{name}.png")
    drawn = {name: pixels(here.root / f"{name}.png") for name in ("base", "none", "full", "half")}
    assert drawn["base"] == drawn["none"]
    assert len(set(drawn.values())) == 3


def test_a_workspace_brings_model_prompts_and_negative_prompt(
    project: Callable[..., Project], small_omnigen: Path, tmp_path: Path
) -> None:
    """The options come before the workspace, and that before the model's own settings."""
    model = tmp_path / "omnigen"
    shutil.copytree(small_omnigen, model)
    own = {"width": 32, "height": 48, "num_inference_steps": 3, "negative_prompt": "of the model"}
    (model / "generation.json").write_text(json.dumps(own))
    here = project("images")
    config = here.root / "omnigen-pipe.toml"
    text = config.read_text().replace(str(small_omnigen), str(model))
    (here.root / "library.json").write_text('{"cat": "a cat"}')
    prompts = '[validation]\nvalidation_prompt = "a dog"\nuser_prompt_library = "library.json"\n'
    config.write_text(text + prompts)
    report = here.json("generate")
    assert [entry["name"] for entry in report["pictures"]] == ["validation", "cat"]
    assert {name: report[name] for name in own} == own
    config.write_text(text + prompts + 'validation_negative_prompt = "of the workspace"\n')
    ended = here.run("generate", "a bird", "--steps", "1", "-o", "bird.png")
    assert "Negative prompt: of the workspace" in ended.stdout
    with Image.open(here.root / "bird.png") as picture:
        assert picture.info["negative_prompt"] == "of the workspace"
        assert (picture.size, picture.info["steps"]) == ((32, 48), "1")
    chosen = here.run("generate", "a bird", "--steps", "1", "--negative-prompt", "")
    assert "Negative prompt" not in chosen.stdout
    outside = Project(tmp_path).json("generate", "a", "--model", "omnigen")
    assert outside["negative_prompt"] == "of the model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "Name one with --model"),
        (("--model", "omnigen"), "There is nothing to draw"),
        (("a", "--model", "omnigen", "-w", "."), "Give one of them"),
        (("a", "--model", "gone"), "gone does not exist"),
        (("a", "--model", "omnigen", "--size", "50x32"), "nearest is 48x32"),
        (("a", "--model", "omnigen", "--size", "4096x16"), "beyond this transformer's 3072 px"),
        (("a", "--model", "omnigen", "--strength", "2"), "name one with --adapter"),
        (("a", "--model", "omnigen", "--adapter", "x", "--strength", "nan"), "a number"),
        (("a", "--model", "omnigen", "--adapter", "gone.safetensors"), "no adapter gone"),
        (("a", "--model", "omnigen", "--precision", "int8"), "one of auto, bf16"),
        (("a", "--model", "omnigen", "--prompt-library", "gone.json"), "--prompt-library gone"),
        (("a", "b", "--model", "omnigen", "-o", "x.png"), "one file, but 2 pictures"),
        (("a", "--model", "omnigen", "--guidance", "inf"), "guidance_scale"),
        (("a", "--model", "omnigen", "--device", "cuda:99"), "CUDA devices"),
        (("a", "--model", "omnigen", "-o", "a.png", "--grid", "a.png"), "Name another"),
    ],
)
def test_what_cannot_be_done_is_said(
    here: Project, arguments: tuple[str, ...], message: str
) -> None:
    ended = here.run("generate", *arguments, status=2)
    assert message in ended.stderr
    assert [path.name for path in here.root.iterdir()] == ["omnigen"], "nothing is left behind"


def test_a_model_that_overflows_fails_and_writes_no_black_picture(
    tmp_path: Path, small_omnigen: Path
) -> None:
    shutil.copytree(small_omnigen, tmp_path / "broken")
    file = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights: dict[str, Any] = load_file(file)
    weights["proj_out.weight"][0, 0] = float("inf")
    save_file(weights, file)
    here = Project(tmp_path)
    ended = here.run("generate", "a", "--model", "broken", *FAST, "--grid", "g.png", status=1)
    assert "overflowed" in ended.stdout
    assert "--precision" in ended.stdout
    assert not list(tmp_path.glob("**/*.png"))
