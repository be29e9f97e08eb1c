"""The model card: how a finished model was made, and what it reaches."""

from __future__ import annotations

from pathlib import Path

import torch

from manifests.publish import publishing
from omnigen_pipe.embedded import autoencoder
from omnigen_pipe.embedded.learned import unseen_scenes
from omnigen_pipe.embedded.making import read_plan
from omnigen_pipe.embedded.rates import draw_scenes, measure
from omnigen_pipe.progress import Progress
from omnigen_pipe.sampling.source import Source

CARD_NAME = "README.md"
#: Sentences by which the model card judges the model.
_JUDGED_BY = 300
_CARD = """\
# The embedded model

A very small OmniGen in diffusers' layout: a transformer of {transformer:.2f} M and a VAE of
{vae:.2f} M parameters, float16. It draws a little world: one or two coloured shapes on a plain
background, 64x64, 96x64 and 64x96 pixels. `docs/embedded-model.md` says what it is for.

Made by `python -m omnigen_pipe.embedded.make FOLDER` with the seed {making.seed}:
{making.vae_steps} steps of the VAE, {making.pictures} pictures and {making.steps} steps of the
transformer, on the CPU with {versions}.

Judged by {rates.pictures} sentences of the world, no two alike, none of which is the sentence of
one of the {making.pictures} pictures. Those know most sentences with a single shape, so the judged
ones are harder than usual: {single} have one shape, and {double} have two.

| figure, measured on the float16 weights | value |
|---|---|
| the VAE's reconstruction of new pictures of the world | {psnr:.1f} dB |
| things of the right colour, with guidance | {rates.colours:.1%} |
| things of the right shape | {rates.shapes:.1%} |
| named backgrounds drawn | {rates.backgrounds:.1%} |
| pictures in which every thing is right and nothing more is seen | {rates.right:.1%} |

Apache-2.0, as the project.
"""


def write_card(model: Path, staging: Path, progress: Progress) -> None:
    """Draw and measure with the finished `model`, and publish its card.

    Raises `PipeError` where its `plan.json` cannot be read.
    """
    making, versions = read_plan(model)
    source = Source(str(model.absolute()), Path.cwd())
    pipe = source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32)
    scenes = unseen_scenes(making, _JUDGED_BY, "card")
    with progress.task("Drawing for the model card", len(scenes)) as advance:
        rates = measure(draw_scenes(pipe, scenes, source.settings(), on_picture=advance), scenes)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipe.transformer, pipe.vae)]
    single = sum(len(scene.things) == 1 for scene in scenes)
    text = _CARD.format(
        transformer=sizes[0] / 1e6,
        vae=sizes[1] / 1e6,
        making=making,
        versions=", then with ".join(versions),
        psnr=autoencoder.psnr(pipe.vae, making.seed),
        rates=rates,
        single=single,
        double=len(scenes) - single,
    )
    with publishing(staging, model / CARD_NAME) as path:
        path.write_text(text, encoding="utf-8")
