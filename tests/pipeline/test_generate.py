"""`omnigen-pipe generate` as it is typed: what it writes, says, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from PIL import Image
from pipeline_project import COMMAND, Project
from safetensors.torch import load_file, save_file

from guide import LYCORIS
from hub_stub import environment, serve
from omnigen_pipe import hub
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.sampling import pipeline
from omnigen_pipe.world.recognition import judge
from omnigen_pipe.world.scenes import Scene, Thing

#: Stands for the file of an adapter of another model.
OTHER = "another model's"
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
    assert said.pop("adapter_blake3") == blake3(adapter.read_bytes()).hexdigest()[:16]
    assert said == {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "seed": "7",
        "steps": "2",
        "guidance": "3",
        "size": "48x32",
        "model": "omnigen",
        "precision": "float32",
        "adapter": "adapter.safetensors",
        "strength": "0.5",
    }
    assert str(here.root).encode() not in (here.root / "out.png").read_bytes()


def test_the_readme_s_command_draws_what_it_says(tmp_path: Path) -> None:
    prompt = "a red circle on a black background"
    Project(tmp_path).run("generate", "--model", "embedded", prompt, "-o", "out.png")
    circle = Thing("circle", "red", 0.5, 0.5, 0.36)
    with Image.open(tmp_path / "out.png") as picture:
        verdict = judge(picture, Scene(64, 64, "black", (circle,), prompt))
    assert verdict.background
    assert verdict.right


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
    with Image.open(here.root / "grid.png") as opened:
        wide, tall = opened.size
        said = dict(opened.info)
    assert json.loads(said["pictures"]) == [
        {"prompt": prompt, "seed": seed} for prompt in ("a cat", "a brown dog") for seed in range(3)
    ]
    assert (said["model"], said["steps"], said["size"]) == ("omnigen", "2", "48x32")
    assert said["negative_prompt"] == DIFFUSERS_NEGATIVE_PROMPT
    assert wide == 3 * (128 + 8) + 8, "a prompt in each row"
    plain = here.json(*draw, "--count", "3", "--grid", "plain.jpg", "--no-captions")
    assert [entry["path"] for entry in plain["pictures"]] == [None] * 6
    assert not (here.root / "generated").exists()
    with Image.open(here.root / "plain.jpg") as opened:
        assert opened.size == (3 * (48 + 8) + 8, 2 * (32 + 8) + 8)
        assert opened.height < tall


def test_an_adapter_of_simpletuner_s_quickstart_is_drawn_with(here: Project, adapter: Path) -> None:
    """`FeedForward` matches nothing there, so that its file has modules of the attention only."""
    tensors = {n: t for n, t in load_file(adapter).items() if "_self_attn_" in n}
    assert 0 < len(tensors) < len(load_file(adapter))
    theirs = here.root / "theirs.safetensors"
    save_file(tensors, theirs, metadata={"format": "pt", "lycoris_config": json.dumps(LYCORIS)})
    preset = LokrConfig().apply_preset.model_copy(update={"target_module": ("Attention",)})
    ours = here.root / "ours.safetensors"
    lokr.save_adapter(tensors, ours, LokrConfig(apply_preset=preset))
    draw = ("generate", "a", "--model", "omnigen", *FAST, "-o")
    here.run(*draw, "base.png")
    for file in (ours, theirs):
        here.run(*draw, f"{file.stem}.png", "--adapter", file.name)
    assert pixels(here.root / "theirs.png") == pixels(here.root / "ours.png")
    assert pixels(here.root / "theirs.png") != pixels(here.root / "base.png")

    tensors.pop(next(name for name in tensors if name.endswith("lokr_w1")))
    save_file(tensors, theirs, metadata={"format": "pt", "lycoris_config": json.dumps(LYCORIS)})
    said = here.run(*draw, "no.png", "--adapter", theirs.name, status=2).stderr
    said = " ".join(said.split())
    assert "It was not made by omnigen-pipe" in said
    assert "merge it into its base by `omnigen-pipe export`" in said


def test_a_model_in_the_authors_layout_is_told_apart(here: Project) -> None:
    theirs = here.root / "exported"
    theirs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (theirs / name).touch()
    (theirs / "vae").mkdir()
    said = " ".join(here.run("generate", "a", "--model", "exported", status=2).stderr.split())
    assert "authors' layout" in said
    assert "--model" in said
    assert "Shitao/OmniGen-v1-diffusers" in said
    assert "--layout diffusers" in said


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
    strengths = ("--strength", "0.5", "--strength", "0", "--strength", "1", "--strength", "0.5")
    report = here.json(*with_it, *strengths, "-o", "all", "--grid", "grid.png", "--batch-size", "4")
    assert [Path(entry["path"]).name for entry in report["pictures"]] == [
        "a-red-circle-0-strength-0.5.png",
        "a-red-circle-0-strength-0.png",
        "a-red-circle-0-strength-1.png",
    ]
    names = ("half", "none", "full")
    for name, entry in zip(names, report["pictures"], strict=True):
        assert pixels(entry["path"]) == drawn[name]
    with Image.open(here.root / "grid.png") as opened:
        assert [entry["strength"] for entry in json.loads(opened.info["pictures"])] == [0.5, 0, 1]
        for column, name in enumerate(names):
            left = 8 + column * (128 + 8) + (128 - 48) // 2
            cell = opened.crop((left, 8, left + 48, 8 + 32))
            assert cell.convert("RGB").tobytes() == drawn[name]


def test_the_average_of_an_adapter_is_drawn_with_where_it_is_asked_for(
    here: Project, adapter: Path
) -> None:
    """Of a checkpoint's folder; `locate_adapter` has tests of its own."""
    folder = here.root / "checkpoint"
    folder.mkdir()
    shutil.copy(adapter, folder / "ema.safetensors")
    tensors: dict[str, Any] = load_file(adapter)
    metadata = {"lycoris_config": LokrConfig().model_dump_json()}
    save_file({n: t * 0.5 for n, t in tensors.items()}, folder / "adapter.safetensors", metadata)
    draw = ("generate", "a red circle", "--model", "omnigen", *FAST, "--adapter")
    drawn = []
    for number, more in enumerate(((folder,), (folder, "--ema"), (folder / "ema.safetensors",))):
        here.run(*draw, *map(str, more), "-o", f"{number}.png")
        drawn.append(pixels(here.root / f"{number}.png"))
    assert drawn[0] != drawn[1] == drawn[2]
    (folder / "ema.safetensors").unlink()
    ended = here.run(*draw, str(folder), "--ema", status=2)
    assert "the run has no average (use_ema = false)" in ended.stderr
    ended = here.run(*draw, str(adapter), "--ema", status=2)
    assert "--ema takes the average" in ended.stderr


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
    assert (outside["precision"], outside["base_model_precision"]) == ("float32", "no_change")


def test_a_workspace_brings_how_its_model_computes(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """What is trained is what is drawn with, unless an option says otherwise."""
    train = {"mixed_precision": "bf16", "base_model_precision": "int8-torchao"}
    here = project(tmp_path, train=train)
    draw = ("generate", "a", *FAST, "-o", "out.png", "--overwrite")
    report = here.json(*draw)
    assert (report["precision"], report["base_model_precision"]) == ("bfloat16", "int8-torchao")
    with Image.open(here.root / "out.png") as opened:
        assert opened.info["precision"] == "bfloat16"
        assert opened.info["base_model_precision"] == "int8-torchao"
    fewer_bits = pixels(here.root / "out.png")
    for name in ("fp32", "no"):
        report = here.json(*draw, "--precision", name, "--base-model-precision", "no_change")
        assert (report["precision"], report["base_model_precision"]) == ("float32", "no_change")
    whole = pixels(here.root / "out.png")
    differences = [abs(a - b) for a, b in zip(fewer_bits, whole, strict=True)]
    assert max(differences) > 0, "it was quantised"
    assert sum(differences) / len(differences) < 8


@pytest.mark.slow
def test_a_model_on_the_hub_is_fetched_and_named(tmp_path: Path, small_omnigen: Path) -> None:
    with serve("maker/omnigen") as (endpoint, running):
        running.files = {
            str(path.relative_to(small_omnigen)): path.read_bytes()
            for path in small_omnigen.rglob("*")
            if path.is_file()
        }
        own = {"width": 48, "height": 32, "num_inference_steps": 1}
        running.files["generation.json"] = json.dumps(own).encode()
        draw = ["generate", "a", "--model", "maker/omnigen", "--device", "cpu", "-o", "out.png"]
        env = environment(endpoint, tmp_path / "cache")
        done = subprocess.run(
            [*COMMAND, *draw], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as opened:
        assert opened.size == (48, 32)
        assert (opened.info["model"], opened.info["steps"]) == ("maker/omnigen", "1")
    local = Project(tmp_path)
    (tmp_path / "omnigen").symlink_to(small_omnigen)
    local.run("generate", "a", "--model", "omnigen", *FAST, "--steps", "1", "-o", "local.png")
    assert pixels(tmp_path / "out.png") == pixels(tmp_path / "local.png")


def test_of_a_model_on_the_hub_no_weights_are_fetched_for_what_cannot_be_done(
    tmp_path: Path, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[str] = []

    def fetch(name: str, kind: str, revision: str | None, patterns: list[str], **_: Any) -> Path:
        wanted.extend(patterns)
        return small_omnigen

    monkeypatch.setattr(hub, "fetch", fetch)
    draw = ("generate", "a", "--model", "maker/omnigen", "--size", "4096x16")
    ended = Project(tmp_path).run(*draw, status=2)
    assert "beyond this transformer's 3072 px" in ended.stderr
    assert "transformer/config.json" in wanted
    assert "transformer/*.safetensors" not in wanted


@pytest.mark.parametrize("how", ["memory", "signal"])
def test_a_grid_has_what_was_drawn_before_the_end(
    here: Project, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    plain, calls = pipeline.draw_latents, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3 and how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(pipeline, "draw_latents", interrupted)
    ended = here.run(
        "generate", "a", "--model", "omnigen", *FAST, "--count", "4", "--grid", "grid.png",
        "--no-captions", status={"memory": 1, "signal": 128 + signal.SIGTERM}[how],
    )  # fmt: skip
    assert len(calls) == 3
    if how == "memory":
        assert "out of memory" in ended.stderr
    else:
        assert "Stopped: 2 of 4 were drawn" in ended.stdout
    assert "grid.png" in ended.stderr
    with Image.open(here.root / "grid.png") as opened:
        assert opened.size == (2 * (48 + 8) + 8, 32 + 2 * 8)
        assert [entry["seed"] for entry in json.loads(opened.info["pictures"])] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "Name one with --model"),
        (("--model", "omnigen"), "There is nothing to draw"),
        (("a", "--model", "omnigen", "-w", "."), "Give one of them"),
        (("a", "--model", "omnigen", "--revision", "main"), "on this machine, not on the hub"),
        (("a", "--revision", "main"), "Name one with --model"),
        (("a", "--model", "gone"), "gone does not exist"),
        (("a", "--model", "omnigen", "--size", "50x32"), "nearest is 48x32"),
        (("a", "--model", "omnigen", "--size", "4096x16"), "beyond this transformer's 3072 px"),
        (("a", "--model", "omnigen", "--strength", "2"), "name one with --adapter"),
        (("a", "--model", "omnigen", "--adapter", "x", "--strength", "nan"), "a number"),
        (("a", "--model", "omnigen", "--adapter", "gone.safetensors"), "no adapter gone"),
        (("a", "--model", "omnigen", "--precision", "int8"), "'int8' is not one of"),
        (("a", "--model", "omnigen", "--base-model-precision", "int3"), "'int3' is not one of"),
        (("a", "--model", "omnigen", "--ema"), "--ema is an adapter's"),
        (("a", "--model", "omnigen", "--negative-prompt", "<|image_1|>"), "asks for an input"),
        (("a", "--model", "omnigen", "-o", "out.jpge"), "are written as .png"),
        (("a", "--model", "omnigen", "--adapter", OTHER), "does not fit this model"),
        (
            ("a", "--model", "omnigen", "--grid", "a.webp", "--count", "900", "--size", "576x16"),
            "more than the 16383 a side",
        ),
        (("a", "--model", "omnigen", "--prompt-library", "gone.json"), "--prompt-library gone"),
        (("a", "b", "--model", "omnigen", "-o", "x.png"), "one file, but 2 pictures"),
        (("a", "--model", "omnigen", "--guidance", "inf"), "guidance_scale"),
        (("a", "--model", "omnigen", "--device", "cuda:99"), "CUDA devices"),
        (("a", "--model", "omnigen", "-o", "a.png", "--grid", "a.png"), "Name another"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    here: Project,
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("omnigen_pipe.model.transformer.load_transformer", loaded)
    if OTHER in arguments:
        # Of a model of another width.
        other = tmp_path_factory.mktemp("other") / "adapter.safetensors"
        tensors: dict[str, Any] = load_file(adapter)
        narrower = {n: t[..., :1].clone() for n, t in tensors.items() if t.ndim}
        save_file(narrower, other, {"lycoris_config": LokrConfig().model_dump_json()})
        arguments = tuple(str(other) if word == OTHER else word for word in arguments)
    ended = here.run("generate", *arguments, status=2)
    assert message in " ".join(ended.stderr.replace("│", " ").split())
    assert "Loading" not in ended.stderr
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
    assert "--precision" not in ended.stdout, "float32 is the widest"
    assert "fetch the model again" in ended.stdout
    half = here.run("generate", "a", "--model", "broken", *FAST, "--precision", "bf16", status=1)
    assert "use --precision fp32" in half.stdout
    assert not list(tmp_path.glob("**/*.png"))
