"""The loop, on a small model and batches made here: the objective falls, cuts change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests.errors import PipeError
from omnigen_pipe.config import Config, LokrConfig, parse
from omnigen_pipe.model import flow
from omnigen_pipe.model.lokr import read_adapter
from omnigen_pipe.model.transformer import predict_velocity
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.metrics import METRICS_NAME, MetricsWriter, truncate
from omnigen_pipe.runs.order import MicroBatch, epoch_order
from omnigen_pipe.runs.trackers import TensorBoard
from omnigen_pipe.stop import StopRequest
from omnigen_pipe.training import loop
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.gradients import AdapterGradients
from omnigen_pipe.training.loop import Course, train
from omnigen_pipe.training.objective import pose, sample_losses
from omnigen_pipe.training.plan import Plan
from omnigen_pipe.training.state import read_state, write_state
from omnigen_pipe.training.trainee import Trainee, load_trainee
from omnigen_pipe.workspace import Workspace

SAMPLES = 8
BUCKETS = np.array([0, 0, 0, 0, 0, 1, 1, 1])
SIZES = {0: (8, 8), 1: (6, 10)}
VARIANCE = (1.0, 1.0, 1.0, 1.0)


def _config(model: Path, **train_options: object) -> Config:
    options = {
        "learning_rate": 3e-3,
        "lr_warmup_steps": 2,
        "train_batch_size": 2,
        "gradient_checkpointing": False,
        "checkpoint_step_interval": 0,
        "seed": 3,
        **train_options,
    }
    model_options = {"pretrained_model_name_or_path": str(model)}
    return parse({"model": model_options, "train": options}, "test")


def _read(micro: MicroBatch, epoch: int, step: int = 0) -> Batch:
    """Batches like the real reader's: fixed latents, and draws that depend on the sample."""
    rows = []
    for sample, repeat in zip(micro.samples.tolist(), micro.repeats.tolist(), strict=True):
        fixed = torch.Generator().manual_seed(sample)
        shape = (4, *SIZES[int(BUCKETS[sample])])
        x1 = torch.randn(shape, generator=fixed)
        prompt = torch.randint(11, 400, (3 + sample,), generator=fixed).tolist()
        drawn = torch.Generator().manual_seed(1000 + 100 * epoch + 10 * repeat + sample)
        x0 = torch.randn(shape, generator=drawn)
        rows.append((x1, x0, torch.sigmoid(torch.randn((), generator=drawn)), prompt))
    x1s, x0s, ts, prompts = zip(*rows, strict=True)
    return Batch(
        sample_ids=[str(s) for s in micro.samples],
        bucket="x".join(map(str, SIZES[int(BUCKETS[micro.samples[0]])])),
        x1=torch.stack(x1s),
        x0=torch.stack(x0s),
        t=torch.stack(ts),
        prompts=list(prompts),
        regularisation=torch.zeros(len(rows), dtype=torch.bool),
    )


def _plan(config: Config, steps: int, start: Position | None = None) -> Plan:
    return Plan(
        start or Position(),
        steps,
        lambda epoch: epoch_order(
            BUCKETS,
            np.zeros(SAMPLES, dtype=np.int64),
            seed=config.train.seed,
            epoch=epoch,
            batch_size=config.train.train_batch_size,
            micro_batches=config.train.gradient_accumulation_steps,
        ),
    )


CPU = torch.device("cpu")


def _load(config: Config, folder: Path) -> Trainee:
    return load_trainee(Workspace(folder, config), LokrConfig(), CPU)


def _sample_losses(trainee: Trainee, batch: Batch) -> torch.Tensor:
    return sample_losses(trainee, pose(trainee, batch), batch)


def _train(
    folder: Path,
    config: Config,
    steps: int,
    *,
    resume: checkpoints.Checkpoint | None = None,
    stop: StopRequest | None = None,
    read: Callable[[MicroBatch, int, int], Batch] = _read,
) -> tuple[Trainee, checkpoints.Checkpoint | None]:
    workspace = Workspace(folder, config)
    trainee = _load(config, folder)
    start = Position()
    if resume is not None:
        read_state(trainee, resume)
        start = resume.position
    saved: list[checkpoints.Checkpoint] = []

    def save(position: Position) -> None:
        saved.append(
            checkpoints.save(
                folder / "checkpoints",
                workspace.staging,
                position,
                lambda path: write_state(trainee, path, LokrConfig(), position.step),
            )
        )

    folder.mkdir(exist_ok=True)
    truncate(folder / METRICS_NAME, start.step, workspace.staging)
    with MetricsWriter(folder) as metrics:
        course = Course(read, save, VARIANCE, Progress(quiet=True), stop or StopRequest(), metrics)
        train(trainee, _plan(config, steps, start), config.train, course)
    return trainee, saved[-1] if saved else None


def _losses(folder: Path) -> list[float]:
    lines = (folder / METRICS_NAME).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_loss_falls_when_eight_samples_are_overfitted(
    small_omnigen: Path, tmp_path: Path
) -> None:
    """With the draws of one epoch for ever: what is left to learn is finite."""
    config = _config(small_omnigen, train_batch_size=4, learning_rate=1e-2)
    _train(tmp_path / "run", config, 100, read=lambda micro, epoch, step: _read(micro, 0))
    losses = _losses(tmp_path / "run")
    assert len(losses) == 100
    assert np.mean(losses[-12:]) < 0.65 * np.mean(losses[:12])


def test_the_loss_is_the_objective_written_out(small_omnigen: Path, tmp_path: Path) -> None:
    trainee = _load(_config(small_omnigen), tmp_path)
    batch = _read(MicroBatch(np.array([1, 3]), np.array([0, 0])), 0)
    t = batch.t[:, None, None, None]
    with torch.no_grad():
        losses = _sample_losses(trainee, batch)
        x_t = t * batch.x1 + (1 - t) * batch.x0
        velocity = predict_velocity(trainee.transformer, x_t, batch.t, batch.prompts)
    expected = ((velocity - (batch.x1 - batch.x0)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)


def test_cutting_a_global_batch_otherwise_changes_only_rounding(
    small_omnigen: Path, tmp_path: Path
) -> None:
    """Gradients of [0, 1, 2, 3] at once equal those of [0, 1, 2] and [3]."""
    trainee = _load(_config(small_omnigen), tmp_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    gradients = []
    for cuts in ([[0, 1, 2, 3]], [[0, 1, 2], [3]], [[3], [1], [0, 2]]):
        trainee.gradients.zero()
        for cut in cuts:
            losses = _sample_losses(
                trainee, _read(MicroBatch(np.array(cut), np.zeros(len(cut), dtype=np.int64)), 0)
            )
            (losses.sum() / 4).backward()
        gradients.append(trainee.gradients.flat.clone())
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_stopping_and_going_on_gives_the_same_losses_and_adapter(
    small_omnigen: Path, tmp_path: Path, stop_at: int
) -> None:
    """Exactly, to the last bit; an epoch is 3 steps here, so stops fall in and between epochs."""
    config = _config(small_omnigen, gradient_accumulation_steps=2)
    _, whole = _train(tmp_path / "whole", config, 9)
    _, first = _train(tmp_path / "parts", config, stop_at)
    assert first is not None
    assert first.position.step == stop_at
    _, second = _train(tmp_path / "parts", config, 9, resume=checkpoints.read(first.folder))
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert whole is not None
    assert second is not None
    one, other = read_adapter(whole.adapter), read_adapter(second.adapter)
    assert one[1] == other[1]
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


def test_metrics_after_the_checkpoint_are_computed_again_not_doubled(
    small_omnigen: Path, tmp_path: Path
) -> None:
    config = _config(small_omnigen, checkpoint_step_interval=2)
    _train(tmp_path / "whole", config, 4)
    _train(tmp_path / "killed", config, 4)
    metrics = tmp_path / "killed" / METRICS_NAME
    metrics.write_text(metrics.read_text() + '{"step": 5, "lo')  # as a killed process leaves it
    folder = tmp_path / "killed" / "checkpoints"
    halfway = checkpoints.read(folder / "step-00000002")
    checkpoints.set_aside(folder, after=2)
    _train(tmp_path / "killed", config, 4, resume=halfway)
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


def test_a_stop_request_ends_after_the_step_and_saves(small_omnigen: Path, tmp_path: Path) -> None:
    stop = StopRequest()

    def read(micro: MicroBatch, epoch: int, step: int) -> Batch:
        stop.signal = 2
        return _read(micro, epoch)

    _, saved = _train(tmp_path / "run", _config(small_omnigen), 50, stop=stop, read=read)
    assert saved is not None
    assert saved.position.step == 1
    assert len(_losses(tmp_path / "run")) == 1


def test_a_loss_that_is_not_finite_ends_training_before_the_step(
    small_omnigen: Path, tmp_path: Path
) -> None:
    def read(micro: MicroBatch, epoch: int, step: int) -> Batch:
        batch = _read(micro, epoch)
        return replace(batch, x1=batch.x1 * math.inf) if epoch == 1 else batch

    config = _config(small_omnigen, checkpoint_step_interval=1)
    with pytest.raises(PipeError, match=r"loss of step 6 is (nan|inf).*checkpoint is of step 5"):
        _train(tmp_path / "run", config, 20, read=read)


def test_a_gradient_that_is_not_finite_ends_training_before_the_step(
    small_omnigen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the loss is finite: the step would spoil the adapter and its checkpoint."""
    calls = 0

    norm = AdapterGradients.norm

    def spoil(gradients: AdapterGradients) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            gradients.flat[7] = math.nan
        return norm(gradients)

    monkeypatch.setattr(AdapterGradients, "norm", spoil)
    config = _config(small_omnigen, checkpoint_step_interval=1)
    with pytest.raises(PipeError, match=r"gradient of step 3 is nan.*checkpoint is of step 2"):
        _train(tmp_path / "run", config, 20)
    last = checkpoints.latest(tmp_path / "run" / "checkpoints")[0]
    assert last is not None
    assert all(t.isfinite().all() for t in read_adapter(last.adapter)[0].values())


def test_weights_that_are_no_numbers_are_never_saved(
    small_omnigen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though loss and gradient were finite: what the last step made is not tried by another."""
    step = torch.optim.AdamW.step

    def leap(optimizer: torch.optim.AdamW) -> object:
        found = step(optimizer)
        if float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 3:
            optimizer.param_groups[0]["params"][-1].data[0] = math.inf
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", leap)
    with pytest.raises(PipeError, match=r"not finite after step 3.*checkpoint is of step 2"):
        _train(tmp_path / "run", _config(small_omnigen, checkpoint_step_interval=1), 3)
    assert checkpoints.names(tmp_path / "run" / "checkpoints") == ["step-00000001", "step-00000002"]


def test_running_out_of_memory_says_what_to_lower(
    small_omnigen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "sample_losses", exhaust)
    with pytest.raises(PipeError, match=r"cpu ran out of memory.*train_batch_size"):
        _train(tmp_path / "run", _config(small_omnigen), 5)


def test_tensorboard_gets_the_same_numbers_and_forgets_what_is_computed_again(
    small_omnigen: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, losses in ((0, [3.0, 2.0, 1.0]), (1, [2.5, 1.5])):
        with MetricsWriter(tmp_path, [TensorBoard(tmp_path / "tensorboard", done)]) as writer:
            for number, loss in enumerate(losses, start=done + 1):
                writer.write(number, {"loss": loss, "learning_rate": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 3.0),
        (2, 2.5),
        (3, 1.5),
    ]
    assert [e.value for e in events.Scalars("train/learning_rate")] == [0.5] * 3


def test_tensorboard_forgets_the_evaluation_before_the_first_step_of_a_run_begun_anew(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (7.0, 3.0):
        with MetricsWriter(tmp_path, [TensorBoard(tmp_path / "tensorboard", 0)]) as writer:
            writer.write_evaluation(0, {"loss": loss}, {"eval/loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(0, 3.0)]


def test_regularisation_data_learn_the_base_models_prediction(
    small_omnigen: Path, tmp_path: Path
) -> None:
    trainee = _load(_config(small_omnigen), tmp_path)
    batch = _read(MicroBatch(np.array([0, 2, 4]), np.zeros(3, dtype=np.int64)), 0)
    mixed = replace(batch, regularisation=torch.tensor([False, True, False]))
    trainee.network.set_multiplier(0.7)
    with torch.no_grad():
        assert _sample_losses(trainee, mixed)[1] < 1e-12, "not yet trained"
        generator = torch.Generator().manual_seed(0)
        for parameter in trainee.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        losses = _sample_losses(trainee, mixed)
        plain = _sample_losses(trainee, batch)
        x_t = flow.interpolate(batch.x1, batch.x0, batch.t)
        adapted = predict_velocity(trainee.transformer, x_t, batch.t, batch.prompts)
        trainee.network.set_multiplier(0.0)
        base = predict_velocity(trainee.transformer, x_t, batch.t, batch.prompts)
    assert all(lora.multiplier == 0.0 for lora in trainee.network.loras)
    torch.testing.assert_close(losses[1], (adapted - base)[1].square().mean())
    torch.testing.assert_close(losses[[0, 2]], plain[[0, 2]])


def test_the_strength_is_put_back_after_regularisation_data(
    small_omnigen: Path, tmp_path: Path
) -> None:
    trainee = _load(_config(small_omnigen), tmp_path)
    trainee.network.set_multiplier(0.7)
    batch = _read(MicroBatch(np.array([0]), np.array([0])), 0)
    _sample_losses(trainee, replace(batch, regularisation=torch.tensor([True])))
    assert {lora.multiplier for lora in trainee.network.loras} == {0.7}


def test_the_base_model_never_changes(small_omnigen: Path, tmp_path: Path) -> None:
    trainee, _ = _train(tmp_path / "run", _config(small_omnigen), 5)
    fresh = _load(_config(small_omnigen), tmp_path)
    trained = dict(trainee.transformer.named_parameters())
    for name, parameter in fresh.transformer.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert trained[name].grad is None


def test_gradient_checkpointing_gives_the_same_losses(small_omnigen: Path, tmp_path: Path) -> None:
    _train(tmp_path / "plain", _config(small_omnigen), 5)
    trainee, _ = _train(
        tmp_path / "checkpointed", _config(small_omnigen, gradient_checkpointing=True), 5
    )
    assert trainee.transformer.is_gradient_checkpointing
    assert np.allclose(_losses(tmp_path / "plain"), _losses(tmp_path / "checkpointed"), rtol=1e-5)


def test_bfloat16_trains_with_float32_adapter_weights(small_omnigen: Path, tmp_path: Path) -> None:
    config = _config(small_omnigen, mixed_precision="bf16", gradient_checkpointing=True)
    trainee, _ = _train(tmp_path / "run", config, 3)
    assert trainee.transformer.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainee.parameters())
    _train(tmp_path / "full", _config(small_omnigen), 3)
    assert np.allclose(_losses(tmp_path / "run"), _losses(tmp_path / "full"), rtol=0.05)
