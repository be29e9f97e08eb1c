"""The embedded model's making: it can be stopped anywhere, and goes on to the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from omnigen_pipe.embedded import autoencoder, make, pretraining, saved_state
from omnigen_pipe.embedded.make import Plan
from omnigen_pipe.progress import Progress
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.workspace import Workspace

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


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "_SCALED_BY", 4)
    monkeypatch.setattr(autoencoder, "_BATCH", 2)
    monkeypatch.setattr(autoencoder, "_JUDGED_BY", 4)
    monkeypatch.setattr(make, "_JUDGED_BY", 4)


@pytest.mark.usefixtures("few_pictures")
def test_a_stopped_vae_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = autoencoder.train_vae(tmp_path / "straight", 3, 5, QUIET)
    monkeypatch.setattr(autoencoder, "_SAVE_EVERY", 2)
    with pytest.raises(Stopped):
        autoencoder.train_vae(tmp_path / "stopped", 3, 5, Killing(3))
    assert torch.load(tmp_path / "stopped", weights_only=True)["step"] == 2
    assert equal(autoencoder.train_vae(tmp_path / "stopped", 3, 5, QUIET), straight)


@pytest.mark.usefixtures("few_pictures")
def test_scaling_leaves_what_is_decoded_and_makes_latents_standard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_vae().eval()
    with torch.no_grad():
        vae.quant_conv.bias += 3
        picture = torch.rand(1, 3, 64, 64) * 2 - 1
        before = vae.encode(picture).latent_dist
        decoded = vae.decode(before.mean).sample
        scaled = autoencoder._scaled(vae, seed=1)
        after = scaled.encode(picture).latent_dist
        assert torch.allclose(scaled.decode(after.mean).sample, decoded, atol=1e-4)
        factor = after.std / before.std
        assert torch.allclose(
            after.mean.diff(dim=-1) / before.mean.diff(dim=-1), factor[..., 1:], rtol=1e-2
        )


@pytest.mark.slow
@pytest.mark.usefixtures("few_pictures")
def test_a_model_is_made_and_a_stopped_pretraining_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = make._CONFIGURATION.replace("train_batch_size = 64", "train_batch_size = 4")
    configuration = configuration.replace("checkpoint_step_interval = 250", "")
    configuration += "checkpoint_step_interval = 2\n"
    monkeypatch.setattr(make, "_CONFIGURATION", configuration)
    plan = Plan(tmp_path / "w", seed=1, vae_steps=2, pictures=12, steps=5)
    finished = make.make(plan, QUIET)
    names = {path.name for path in finished.iterdir()}
    assert {"transformer", "vae", "tokenizer", "scheduler", "model_index.json"} <= names
    source = Source(str(finished), Path("/"))
    assert source.settings().size == "64x64"
    made = source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32).transformer
    lines = (plan.folder / "runs/pretraining/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert make.make(plan, QUIET) == finished

    def stop_after_saving(*arguments: Any) -> None:
        saved_state.save_state(*arguments)
        raise Stopped

    (plan.folder / "pretraining.pt").unlink()
    shutil.rmtree(finished)
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "save_state", stop_after_saving)
        with pytest.raises(Stopped):
            make.make(plan, QUIET)
    make.make(plan, QUIET)
    again = source.pipeline(source.tokenizer(), torch.device("cpu"), torch.float32).transformer
    assert equal(again, made)
    folder = plan.model / "transformer"
    assert not equal(pretraining.load_transformer(folder, torch.float32, torch.device("cpu")), made)
    assert Workspace.open(plan.folder).config.train.max_train_steps == 5
