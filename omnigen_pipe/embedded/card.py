"""The model card: how a finished model was made, and what it reaches."""

from __future__ import annotations

from pathlib import Path

import torch

from manifests.publish import publishing
from omnigen_pipe.embedded import autoencoder
from omnigen_pipe.embedded.learned import learned_scenes, unseen_scenes, usual_scenes
from omnigen_pipe.embedded.making import read_plan
from omnigen_pipe.embedded.rates import draw_scenes, measure
from omnigen_pipe.embedded.recipe import recipe
from omnigen_pipe.progress import Progress
from omnigen_pipe.sampling.source import Source

CARD_NAME = "README.md"
#: Sentences by which the model card judges the model.
_JUDGED_BY = 300
_CARD = """\
# The embedded model

A very small OmniGen in diffusers' layout: a transformer of {transformer:.2f} M and a VAE of
{vae:.2f} M parameters, float16. It draws a little world: one or two coloured shapes on a plain
background, 64x64, 96x64 and 64x96 pixels, and forty shapes with made-up names, each of an upper
part, whose colour is named, and a lower one, whose colour is its own: in about one picture of six
they are the same.
`docs/embedded-model.md` says what it is for.

Made by `python -m omnigen_pipe.embedded.make FOLDER` with the seed {making.seed}:
{making.vae_steps} steps of the VAE, {making.pictures} pictures and {making.steps} steps of the
transformer, on the CPU with {versions}.

Judged by {number} sentences as the world has them, {learned} of which are the sentence of one of
the {making.pictures} pictures, and by {number} sentences of which none is. Those pictures know most
sentences with a single shape, so the unseen ones are harder: {double} have two.

| figure, measured on the float16 weights | sentences as they come | unseen sentences |
|---|---|---|
| things of the right colour, with guidance | {usual.colours:.1%} | {unseen.colours:.1%} |
| things of the right shape | {usual.shapes:.1%} | {unseen.shapes:.1%} |
| things of the named size | {usual.sizes:.1%} | {unseen.sizes:.1%} |
| named backgrounds drawn | {usual.backgrounds:.1%} | {unseen.backgrounds:.1%} |
| pictures in which the colours and shapes of everything are right \
| {usual.colours_and_shapes:.1%} | {unseen.colours_and_shapes:.1%} |
| pictures in which all that is named is right | {usual.right:.1%} | {unseen.right:.1%} |

The VAE's reconstruction of new pictures of the world: {psnr:.1f} dB.

Apache-2.0, as the project.
"""


def write_card(model: Path, staging: Path, progress: Progress) -> None:
    """Draw and measure with the finished `model`, and publish its card.

    Raises `PipeError` where its `plan.json` cannot be read, and `UsageError` where it was made by
    another recipe than this version's: what it has not seen could not be told.
    """
    plan = read_plan(model)
    making = plan.making
    plan.check_recipe(model, recipe(making))
    source = Source(str(model.absolute()), Path.cwd())
    pipe = source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32)
    usual, unseen = usual_scenes(_JUDGED_BY, "card"), unseen_scenes(making, _JUDGED_BY, "card")
    with progress.task("Drawing for the model card", 2 * _JUDGED_BY) as advance:
        rates = [
            measure(draw_scenes(pipe, scenes, source.settings(), on_picture=advance), scenes)
            for scenes in (usual, unseen)
        ]
    captions = {scene.caption for scene in learned_scenes(making)}
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipe.transformer, pipe.vae)]
    text = _CARD.format(
        transformer=sizes[0] / 1e6,
        vae=sizes[1] / 1e6,
        making=making,
        versions=", then with ".join(plan.versions),
        psnr=autoencoder.psnr(pipe.vae, making.seed),
        number=_JUDGED_BY,
        learned=sum(scene.caption in captions for scene in usual),
        double=sum(len(scene.things) == 2 for scene in unseen),
        usual=rates[0],
        unseen=rates[1],
    )
    with publishing(staging, model / CARD_NAME) as path:
        path.write_text(text, encoding="utf-8")
