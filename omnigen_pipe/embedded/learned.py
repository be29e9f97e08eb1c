"""What the transformer learns from: drawn pictures with their sentences, and what was not shown.

Which pictures are drawn is a function of the seed and their number alone, so that it can be said
later of any sentence whether the model was trained on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from manifests.publish import discard, publishing
from omnigen_pipe.config import CONFIG_NAME
from omnigen_pipe.embedded.making import STAGING_NAME, Making
from omnigen_pipe.progress import Progress
from omnigen_pipe.world.drawing import save
from omnigen_pipe.world.scenes import Scene, distinct, imagine, imagine_made_up

CAPTIONS_NAME = "captions.jsonl"
#: How many of the pictures show a shape with a made-up name: who knows many words learns another
#: one sooner.
_MADE_UP = 0.2
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


def learned_scenes(making: Making) -> Iterator[Scene]:
    """The scenes of the pictures that are drawn for the pretraining, in order."""
    draw = random.Random(f"{making.seed}:pictures")
    for _ in range(making.pictures):
        yield imagine_made_up(draw) if draw.random() < _MADE_UP else imagine(draw)


def usual_scenes(number: int, seed: str) -> list[Scene]:
    """`number` scenes of the known world as they come, no two with one sentence; the same for the
    same `seed`."""
    return distinct(_endless(f"{seed}:usual"), number)


def unseen_scenes(making: Making, number: int, seed: str) -> list[Scene]:
    """`number` scenes of the known world, no two with one sentence, and none with a sentence that
    was learned; the same for the same `seed`.

    Nearly all sentences with a single thing are learned, so most of these have two.
    """
    learned = {scene.caption for scene in learned_scenes(making)}
    return distinct(_endless(f"{seed}:unseen"), number, learned)


def _endless(seed: str) -> Iterator[Scene]:
    draw = random.Random(seed)
    while True:
        yield imagine(draw)


def draw_learned(folder: Path, making: Making, progress: Progress) -> None:
    """Draw what is learned into `folder`, as PNG files with one table of captions, and publish the
    configuration that the stages read.

    The table comes last: where it is, the rest is complete, and nothing is done.
    """
    captions, staging = folder / CAPTIONS_NAME, folder / STAGING_NAME
    if captions.exists():
        return
    pictures = folder / "pictures"
    discard(pictures)  # of a start that did not come to the table
    lines = []
    # Published as a folder, they are flushed to the disk before the table says that they are there.
    with (
        publishing(staging, pictures) as unfinished,
        progress.task("Drawing pictures", making.pictures) as advance,
    ):
        unfinished.mkdir()
        for number, scene in enumerate(learned_scenes(making)):
            path = unfinished / f"{number:06}.png"
            save(scene, path)
            lines.append(json.dumps({"path": path.name, "caption": scene.caption}) + "\n")
            advance(1)
    configuration = _CONFIGURATION.format(seed=making.seed, steps=making.steps)
    texts = {CONFIG_NAME: configuration, CAPTIONS_NAME: "".join(lines)}
    for name, text in texts.items():
        with publishing(staging, folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
