"""The recipe of the embedded model as a digest, so that no making mixes two of them.

What is learned is taken as it comes out, whatever code drew it: the sentences, the first pictures,
every shape, the VAE's first pictures, and the tokenizer's sentences; and of the modules that train,
every constant. A change of the trainings' code beyond their constants is not seen.
"""

from __future__ import annotations

from itertools import islice

from blake3 import blake3

from omnigen_pipe.embedded import autoencoder, learned, pretraining, tokenizer
from omnigen_pipe.embedded.making import Making
from omnigen_pipe.prompts.template import render
from omnigen_pipe.world.drawing import outline, paint, second_colour
from omnigen_pipe.world.scenes import FINER_SHAPES, MADE_UP_SHAPES, SHAPES

_PAINTED, _VAE_STEPS = 200, 8
#: Constants that say how often something is saved, or by how much it is judged.
_ASIDE = {"_SAVE_EVERY", "_JUDGED_BY"}


def recipe(making: Making) -> str:
    """The digest of all that decides what `making` makes, but for its own numbers and versions of
    libraries; 16 hexadecimal digits."""
    hashed = blake3()
    for scene in learned.learned_scenes(making):
        hashed.update(f"{scene}{render(scene.caption)}".encode())
    for scene in islice(learned.learned_scenes(making), _PAINTED):
        hashed.update(paint(scene).tobytes())
    for shape in dict.fromkeys((*SHAPES, *FINER_SHAPES, *MADE_UP_SHAPES)):
        corners = [[(round(x, 6), round(y, 6)) for x, y in part] for part in outline(shape)]
        hashed.update(f"{shape}{corners}{second_colour(shape)}".encode())
    for step in range(_VAE_STEPS):
        hashed.update(autoencoder.batch(making.seed, step).numpy().tobytes())
    for sentence in tokenizer.world_sentences(making.seed):
        hashed.update(sentence.encode())
    for module in (autoencoder, learned, pretraining, tokenizer):
        hashed.update(repr(_constants(vars(module))).encode())
    return hashed.hexdigest()[:16]


def _constants(names: dict[str, object]) -> list[tuple[str, object]]:
    """What is in capitals and prints the same everywhere."""
    plain = (int, float, str, tuple, dict)
    return sorted(
        (name, value)
        for name, value in names.items()
        if name.isupper() and isinstance(value, plain) and name not in _ASIDE
    )
