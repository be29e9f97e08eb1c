"""The embedded model's VAE in training: it goes on where it was, and its latents are scaled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests.errors import PipeError
from omnigen_pipe.embedded import autoencoder
from omnigen_pipe.progress import Progress
from omnigen_pipe.world.drawing import paint
from omnigen_pipe.world.scenes import imagine

QUIET = Progress(quiet=True)


class Stopped(Exception):
    """The process was killed here."""


class Killing(Progress):
    """Stops the work when so much is done."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self.left = after

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Any]:
        def advance(amount: int, detail: str = "", more: str = "") -> None:
            self.left -= amount
            if self.left == 0:
                raise Stopped

        yield advance


def equal(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def trained(folder: Path, name: str, steps: int, progress: Progress = QUIET) -> Any:
    return autoencoder.train_vae(folder / name, folder / "staging", 3, steps, progress)


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "_SCALED_BY", 4)
    monkeypatch.setattr(autoencoder, "_BATCH", 2)


@pytest.mark.usefixtures("few_pictures")
def test_a_stopped_vae_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trained(tmp_path, "straight", 5)
    monkeypatch.setattr(autoencoder, "_SAVE_EVERY", 2)
    with pytest.raises(Stopped):
        trained(tmp_path, "stopped", 5, Killing(3))
    assert torch.load(tmp_path / "stopped", weights_only=True)["step"] == 2
    with pytest.raises(PipeError, match=f"{tmp_path / 'stopped'} was saved in training on"):
        trained(tmp_path, "stopped", 6)  # its rates were those of 5 steps
    assert equal(trained(tmp_path, "stopped", 5), straight)


def test_scaling_leaves_what_is_decoded_and_makes_latents_standard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_vae().eval()
    monkeypatch.setattr(autoencoder, "_SCALED_BY", 64)
    factor = autoencoder.SCALING_FACTOR
    draw = random.Random("1:scale")  # the pictures by which it is scaled
    pictures = [autoencoder.pixels([paint(imagine(draw))]) for _ in range(autoencoder._SCALED_BY)]
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([3.0, 0.0, -1.0, 0.1])
        before = vae.encode(pictures[0]).latent_dist
        decoded = vae.decode(before.mean).sample
        scaled = autoencoder._scaled(vae, seed=1)
        after = scaled.encode(pictures[0]).latent_dist
        assert torch.allclose(scaled.decode(after.mean).sample, decoded, atol=1e-4)
        latents = torch.cat(
            [scaled.encode(p).latent_dist.mean.flatten(2)[0] * factor for p in pictures], dim=1
        )  # [4, N]
    assert latents.mean(dim=1).abs().max() < 1e-3
    assert (latents.var(dim=1) - 1).abs().max() < 1e-3
    # The posterior's deviation grows as its mean's does.
    grown = (after.mean.amax((0, 2, 3)) - after.mean.amin((0, 2, 3))) / (
        before.mean.amax((0, 2, 3)) - before.mean.amin((0, 2, 3))
    )
    assert torch.allclose(after.std / before.std, grown[None, :, None, None], rtol=1e-3)
