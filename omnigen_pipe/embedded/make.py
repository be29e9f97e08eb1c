"""Make the embedded model from nothing: `python -m omnigen_pipe.embedded.make FOLDER`.

A tokenizer from the world's sentences; a VAE from drawings; then the project's own stages over
thousands of drawn pictures, and the pretraining of the transformer on what they made. Whatever
lies in FOLDER already is not made again, so the same command goes on after a stop. The finished
model is FOLDER/finished; `--into` copies it, for instance over the one in the package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnigen_pipe.embedded.layout import write_scheduler_and_index
from omnigen_pipe.embedded.tokenizer import build_tokenizer
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.template import CFG_PROMPT, DIFFUSERS_NEGATIVE_PROMPT, render
from omnigen_pipe.world.drawing import save
from omnigen_pipe.world.scenes import distinct, imagine

SEED = 0
VAE_STEPS = 5000
PICTURES = 24_000
STEPS = 4_000
#: Enough for every word of the world and of diffusers' negative prompt.
_VOCABULARY = 576
_STAGES = ("discover", "bucket", "encode-vae", "tokenize")

_CONFIGURATION = """\
[model]
pretrained_model_name_or_path = "model"

[defaults]
resolution = 64
resolution_type = "pixel"
aspect_bucket_alignment = 16

[vae]
vae_batch_size = 32

[[dataset]]
id = "world"
instance_data_dir = "pictures"
list_file = "captions.jsonl"
caption_strategy = "jsonl"

[train]
tracker_run_name = "pretraining"
seed = {seed}
max_train_steps = {steps}
train_batch_size = 64
learning_rate = 1.5e-3
lr_scheduler = "cosine"
lr_warmup_steps = 200
adam_beta2 = 0.99
adam_weight_decay = 0.01
caption_dropout_probability = 0.1
gradient_checkpointing = false
mixed_precision = "no"
checkpoint_step_interval = 250
"""

_CARD_NAME = "README.md"
#: Sentences by which the model card judges the model.
_JUDGED_BY = 300
_CARD = """\
# The embedded model

A very small OmniGen in diffusers' layout: a transformer of {transformer:.2f} M and a VAE of
{vae:.2f} M parameters, float16. It draws a little world: one or two coloured shapes on a plain
background, 64x64, 96x64 and 64x96 pixels. `docs/embedded-model.md` says what it is for.

Made by `python -m omnigen_pipe.embedded.make FOLDER` with the seed {plan.seed}: {plan.vae_steps}
steps of the VAE, {plan.pictures} pictures and {plan.steps} steps of the transformer, on the CPU
with torch {torch} and diffusers {diffusers}.

| figure, measured on the float16 weights | value |
|---|---|
| the VAE's reconstruction of new pictures of the world | {psnr:.1f} dB |
| things of the right colour, in {rates.pictures} sentences, with guidance | {rates.colours:.1%} |
| things of the right shape | {rates.shapes:.1%} |
| named backgrounds drawn | {rates.backgrounds:.1%} |
| pictures in which every thing is right and nothing more is seen | {rates.right:.1%} |

Apache-2.0, as the project.
"""


@dataclass(frozen=True)
class Plan:
    """Where the model is made, and how much of everything."""

    folder: Path
    seed: int = SEED
    vae_steps: int = VAE_STEPS
    pictures: int = PICTURES
    steps: int = STEPS

    @property
    def model(self) -> Path:
        """The model's parts as they come, in diffusers' layout; the transformer is untrained."""
        return self.folder / "model"


def make(plan: Plan, progress: Progress) -> Path:
    """Make the model as far as it is not made; returns its folder.

    Leaves with status 130 where a signal stopped it: what was done is kept.
    """
    import torch

    from omnigen_pipe.config import VaeConfig
    from omnigen_pipe.embedded import autoencoder, pretraining
    from omnigen_pipe.latents.vae import load_vae
    from omnigen_pipe.workspace import Workspace

    finished = plan.folder / "finished"
    if (finished / _CARD_NAME).exists():
        return finished
    plan.folder.mkdir(parents=True, exist_ok=True)
    _make_tokenizer(plan)
    if not (plan.model / "vae" / "config.json").exists():
        state = plan.folder / "vae.pt"
        vae = autoencoder.train_vae(state, plan.seed, plan.vae_steps, progress)
        progress.note(f"The VAE reaches {autoencoder.psnr(vae, plan.seed):.1f} dB.")
        _save_whole(vae, plan.model / "vae")
    if not (plan.model / "transformer" / "config.json").exists():
        transformer = pretraining.new_transformer(_VOCABULARY, plan.seed)
        _save_whole(transformer, plan.model / "transformer")
    draw_pictures(plan, progress)
    for stage in _STAGES:
        command = [sys.executable, "-m", "omnigen_pipe.cli", stage, "-w", str(plan.folder)]
        subprocess.run(command, check=True)
    trained = pretraining.pretrain(
        Workspace.open(plan.folder),
        plan.model / "transformer",
        plan.folder / "pretraining.pt",
        progress,
    )
    if trained is None:
        raise SystemExit(130)
    _save_whole(trained.to(torch.float16), finished / "transformer")
    vae = load_vae(plan.model / "vae", VaeConfig(), torch.device("cpu"))
    _save_whole(vae.to(torch.float16), finished / "vae")
    shutil.copytree(plan.model / "tokenizer", finished / "tokenizer", dirs_exist_ok=True)
    write_scheduler_and_index(finished)
    _write_defaults(finished)
    _write_card(plan, finished, progress)
    return finished


def _make_tokenizer(plan: Plan) -> None:
    draw = random.Random(f"{plan.seed}:tokenizer")
    sentences = [render(imagine(draw).caption) for _ in range(2000)]
    sentences += [render(DIFFUSERS_NEGATIVE_PROMPT)] * 2
    build_tokenizer(plan.model / "tokenizer", sentences, _VOCABULARY)


def draw_pictures(plan: Plan, progress: Progress) -> None:
    """Draw the world that is learned, as PNG files with one table of captions."""
    captions = plan.folder / "captions.jsonl"
    if captions.exists():
        return
    folder = plan.folder / "pictures"
    folder.mkdir(exist_ok=True)
    draw = random.Random(f"{plan.seed}:pictures")
    lines = []
    with progress.task("Drawing pictures", plan.pictures) as advance:
        for number in range(plan.pictures):
            scene = imagine(draw)
            path = folder / f"{number:06}.png"
            save(scene, path)
            lines.append(json.dumps({"path": path.name, "caption": scene.caption}) + "\n")
            advance(1)
    (plan.folder / "omnigen-pipe.toml").write_text(
        _CONFIGURATION.format(seed=plan.seed, steps=plan.steps), encoding="utf-8"
    )
    captions.write_text("".join(lines), encoding="utf-8")


def _save_whole(part: Any, folder: Path) -> None:
    """Save a part of the model so that its folder appears whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    part.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _write_defaults(folder: Path) -> None:
    """What `generate` takes where nothing is said."""
    defaults = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 20,
        "guidance_scale": 2.5,
        "negative_prompt": CFG_PROMPT,
    }
    text = json.dumps(defaults, indent=2) + "\n"
    (folder / "generation.json").write_text(text, encoding="utf-8")


def _write_card(plan: Plan, folder: Path, progress: Progress) -> None:
    """The model card, with what the finished model reaches; written last."""
    import diffusers
    import torch

    from omnigen_pipe.embedded import autoencoder
    from omnigen_pipe.embedded.rates import draw_scenes, measure
    from omnigen_pipe.sampling.source import Source

    source = Source(str(folder), Path.cwd())
    pipe = source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32)
    draw = random.Random(f"{plan.seed}:card")
    scenes = distinct([imagine(draw) for _ in range(_JUDGED_BY + 100)])[:_JUDGED_BY]
    with progress.task("Drawing for the model card", len(scenes)) as advance:
        rates = measure(draw_scenes(pipe, scenes, source.settings(), on_picture=advance), scenes)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipe.transformer, pipe.vae)]
    text = _CARD.format(
        transformer=sizes[0] / 1e6,
        vae=sizes[1] / 1e6,
        plan=plan,
        psnr=autoencoder.psnr(pipe.vae, plan.seed),
        rates=rates,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )
    (folder / _CARD_NAME).write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m omnigen_pipe.embedded.make", description="Make the embedded model."
    )
    parser.add_argument("folder", type=Path, help="where to work; the same folder goes on")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the pretraining")
    parser.add_argument("--into", type=Path, help="copy the finished model into this folder")
    given = parser.parse_args()
    plan = Plan(given.folder, given.seed, given.vae_steps, given.pictures, given.steps)
    finished = make(plan, Progress())
    if given.into is not None:
        shutil.copytree(finished, given.into, dirs_exist_ok=True)
    print(given.into or finished)


if __name__ == "__main__":
    main()
