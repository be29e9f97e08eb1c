"""Several processes, real ones that talk by gloo, train what one process trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from forked import note_shards, start_all
from pipeline_project import COMMAND, Project
from safetensors.torch import load_file
from training_project import change, evaluations, losses, metrics, prepare


def _adapter(here: Project, run: str, step: int, name: str) -> dict[str, torch.Tensor]:
    folder = here.root / "runs" / run / "checkpoints" / f"step-{step:08d}"
    return dict(load_file(folder / name))


def _train(here: Project, size: int, first: Callable[[], object] | None = None) -> dict[str, Any]:
    """Train in `size` processes; the first one's summary. The others print nothing."""
    children = start_all(here.root, size, "train", "--json", "--device", "cpu", first=first)
    summary: dict[str, Any] = children[0].json()
    for child in children[1:]:
        ended = child.ended()
        assert ended.stdout == ""
        assert "Evaluation" not in ended.stderr
    return summary


def _same(here: Project, run: str, other: str, steps: int) -> None:
    one, two = metrics(here, run), metrics(here, other)
    assert len(one) == len(two) == steps
    for a, b in zip(one, two, strict=True):
        assert a["samples"] == b["samples"]
        assert a["samples_by_t"] == b["samples_by_t"]
        for key in ("loss", "grad_norm", "regularisation_loss", "rollout_loss"):
            assert (key in a) == (key in b)
            # Regularisation's is the square of a small difference of two outputs near 1, each
            # rounded: its relative error is larger by as much as it is smaller.
            small = {"rel": 1e-5, "abs": 1e-10} if key == "regularisation_loss" else {"rel": 1e-6}
            same = pytest.approx(b.get(key, 0), **small)
            assert a.get(key, 0) == same, (a["step"], key)
    for name in ("adapter.safetensors", "ema.safetensors"):
        first, second = (_adapter(here, r, steps, name) for r in (run, other))
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, second[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "sharded"),
    [
        (2, False),
        pytest.param(3, False, marks=pytest.mark.slow),
        (2, True),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_processes_give_the_losses_of_one_at_the_same_global_batch(
    project: Callable[..., Project], tmp_path: Path, size: int, sharded: bool
) -> None:
    """Four micro-batches: two each, or for three processes two, one and one; the last global
    batch of an epoch leaves some without any. Sharded ones run the model equally often."""
    here = prepare(project, tmp_path)
    here.run("train", "--device", "cpu")
    assert sum("regularisation_loss" in line for line in metrics(here)) > 1
    assert sum("rollout_loss" in line for line in metrics(here)) > 1
    # M is frozen at the start: one process more would make another global batch.
    change(here, tracker_run_name="several")
    note = partial(note_shards, str(tmp_path / "shards"))
    if size == 2:
        change(here, gradient_accumulation_steps=2)
        change(here, fsdp_enable=sharded, gradient_checkpointing=sharded)
        _train(here, 2, note)
        _same(here, "default", "several", 8)
    else:
        # Begun by one process, which fixes the global batch, and gone on with by three.
        change(here, max_train_steps=8, checkpoint_step_interval=1)
        _begin(here, steps=2)
        change(here, gradient_accumulation_steps=1)
        change(here, fsdp_enable=sharded, gradient_checkpointing=sharded)
        summary = _train(here, 3, note)
        assert any("stays at the 4 micro-batches" in note for note in summary["notes"])
        _same(here, "default", "several", 8)
    held = (tmp_path / "shards").read_text().splitlines() if sharded else []
    assert len(held) == size * sharded
    for line in held:
        own, whole = map(int, line.split())
        assert own < 1.1 * whole / size
    for a, b in zip(evaluations(here), evaluations(here, "several"), strict=True):
        assert a["step"] == b["step"]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert a["ema"]["losses"] == pytest.approx(b["ema"]["losses"], rel=1e-5)
    # Of the same weights the evaluation is the same to the last bit, whoever computes it.
    assert evaluations(here)[0] == evaluations(here, "several")[0]


def test_float16_goes_on_in_a_process_that_has_nothing_to_scale(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """One micro-batch a step, begun by one process and gone on with by two."""
    here = prepare(project, tmp_path, gradient_accumulation_steps=1, mixed_precision="fp16")
    change(here, eval_steps_interval=0, checkpoint_step_interval=1)
    here.run("train", "--device", "cpu")
    change(here, tracker_run_name="several")
    _begin(here, steps=2)
    summary = _train(here, 2)
    assert any("1 of the 2 processes" in note for note in summary["notes"])
    assert losses(here) == losses(here, "several")


def _begin(here: Project, steps: int) -> None:
    """Train a few steps of a run whose configuration says more, by deleting later checkpoints."""
    here.run("train", "--device", "cpu")
    for folder in (here.root / "runs" / "several" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > steps:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def test_what_is_wrong_is_said_once(project: Callable[..., Project], tmp_path: Path) -> None:
    here = prepare(project, tmp_path, eval_steps_interval=0, resume_from_checkpoint="step-1")
    ended = [child.ended(2) for child in start_all(here.root, 2, "train", "--device", "cpu")]
    assert "has no checkpoint `step-1`" in ended[0].stderr
    assert ended[1].stderr == ""


def test_a_damaged_latent_ends_all_and_is_named_by_the_one_that_read_it(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    here = prepare(project, tmp_path, train_batch_size=1, gradient_accumulation_steps=8)
    samples = pq.read_table(here.root / "manifests" / "samples.parquet").to_pylist()
    kept = {row["pixels_key"] for row in samples if row["dataset"] == "kept"}
    for row in pq.read_table(here.root / "manifests" / "latents").to_pylist():
        if row["pixels_key"] in kept:
            shard = here.root / row["shard"]
            data = bytearray(shard.read_bytes())
            data[row["offset"] + 9] ^= 0xFF
            shard.write_bytes(data)
    change(here, eval_steps_interval=0, max_train_steps=40)
    ended = [child.ended(1) for child in start_all(here.root, 2, "train", "--device", "cpu")]
    said = [e.stderr for e in ended]
    assert any("The latent at byte" in text for text in said), said
    assert all("The latent at byte" in text or "Another process" in text for text in said), said


def test_a_dead_process_ends_the_others_and_the_run_goes_on(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    here = prepare(project, tmp_path, max_train_steps=100_000, checkpoint_step_interval=2)
    change(here, gradient_accumulation_steps=2, eval_steps_interval=0, lr_scheduler="constant")
    children = start_all(here.root, 2, "train", "--device", "cpu")
    _wait_for_steps(here, 5)
    children[1].kill()
    ended = children[0].ended(1)
    assert "Another process of this training ended" in ended.stderr
    assert "checkpoints are whole" in ended.stderr
    steps = max(
        int(p.name.removeprefix("step-"))
        for p in (here.root / "runs" / "default" / "checkpoints").iterdir()
    )
    change(here, max_train_steps=steps + 2)
    _train(here, 2)
    change(here, tracker_run_name="whole")
    _train(here, 2)
    assert losses(here) == losses(here, "whole")


def _wait_for_steps(here: Project, steps: int) -> None:
    path = here.root / "runs" / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_the_command_starts_the_processes_itself(
    project: Callable[..., Project], tmp_path: Path, number: signal.Signals | None
) -> None:
    """To the end; or stopped by a signal, saved by all together, and gone on with."""
    here = prepare(project, tmp_path, eval_steps_interval=0, gradient_accumulation_steps=2)
    if number is not None:
        change(here, max_train_steps=100_000, lr_scheduler="constant")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, "train", "--processes=2", "--device", "cpu", "--json"],
        cwd=here.root,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if number is not None:
        _wait_for_steps(here, 3)
        process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == (128 + number if number else 0), errors
    assert "Traceback" not in errors
    summary = json.loads(output)
    steps = summary["counts"]["steps"]
    assert len(losses(here)) == steps
    assert Path(summary["adapter"]).parent.name == f"step-{steps:08d}"
