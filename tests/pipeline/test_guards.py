"""What may go wrong with a training: each has a clear end, names what is at fault, loses nothing.

Every run here has all that training knows: two buckets, repeats, regularisation, rollout,
averages and evaluations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from pipeline_project import Ended, Project, configured
from safetensors.torch import load_file
from test_full_disk import _leave_room, small_disk
from training_project import change, evaluations, losses, metrics, prepare

from omnigen_pipe.cli import main
from omnigen_pipe.runs.checkpoints import read
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.training import session
from omnigen_pipe.training.preflight import largest_batch
from omnigen_pipe.workspace import Workspace

__all__ = ["small_disk"]

STEPS = 6
TRAIN = ("train", "--device", "cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Project:
    """Ready for training: whoever trains makes a copy."""
    folder = tmp_path_factory.mktemp("guards")
    return prepare(
        partial(configured, folder / "workspace", small_omnigen),
        folder,
        max_train_steps=STEPS,
        gradient_accumulation_steps=2,
        checkpoint_step_interval=2,
        learning_rate=1e-3,
        lr_scheduler="constant",
    )


@pytest.fixture(scope="module")
def trained(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run that never failed."""
    here = _copy(prepared, tmp_path_factory.mktemp("trained"))
    here.run(*TRAIN)
    assert _names(here) == ["step-00000002", "step-00000004", "step-00000006"]
    return here


def _copy(ready: Project, folder: Path) -> Project:
    return Project(Path(shutil.copytree(ready.root, folder / "workspace")))


def _folder(here: Project, run: str = "default") -> Path:
    return here.root / "runs" / run


def _checkpoint(here: Project, step: int, run: str = "default") -> Path:
    return _folder(here, run) / "checkpoints" / f"step-{step:08d}"


def _names(here: Project) -> list[str]:
    return sorted(p.name for p in (_folder(here) / "checkpoints").iterdir())


def _back_to(here: Project, step: int) -> None:
    """Take back a trained run to its checkpoint of `step`."""
    for name in _names(here):
        if int(name.removeprefix("step-")) > step:
            shutil.rmtree(_folder(here) / "checkpoints" / name)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = _folder(here) / name
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))


def _check_same(here: Project, trained: Project) -> None:
    """The run ended as the one that never failed."""
    assert metrics(here) == metrics(trained)
    assert evaluations(here) == evaluations(trained)
    for name in ("adapter.safetensors", "ema.safetensors"):
        one, other = (load_file(_checkpoint(w, STEPS) / name) for w in (here, trained))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name


def _error(ended: Ended) -> str:
    """The one line that says what went wrong."""
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, ended.stderr
    return ended.stderr[ended.stderr.index("Error: ") :]


# A full disk.


def _check_nothing_half(here: Project, before: list[str]) -> None:
    for name in _names(here):
        assert read(_folder(here) / "checkpoints" / name).damage() is None
    assert set(before) <= set(_names(here))
    assert list((here.root / "staging").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("board", ["none", "tensorboard"])
def test_a_disk_that_is_full_at_any_point_of_training(
    trained: Project, small_disk: Path, tmp_path: Path, board: str
) -> None:
    """From no room at all to enough: the run's settings, its metrics and every file of a
    checkpoint are what finds none."""
    here = _copy(trained, small_disk)
    outside = tmp_path / "outside"  # where there is room for what the process says
    outside.symlink_to(here.root)
    change(here, report_to=board)
    here.run(*TRAIN)  # weights are looked at once and remembered
    _back_to(here, 2)
    size = sum(path.stat().st_size for path in _checkpoint(here, 2).iterdir())
    said = []
    for room in (0, 1, 2, 6, 12, size // 2 // 4096, size // 4096 - 1, size // 4096 + 6):
        before = _names(here)
        filler = _leave_room(small_disk, room)
        if board == "none":
            ended = here.run(*TRAIN, status=1)
        else:  # in a process of its own: TensorBoard writes in a thread, which would cry there
            ended = forked.start(outside, *TRAIN).ended(1)
        filler.unlink()
        message = _error(ended)
        assert "could not be written: No space left on device" in message
        assert message.endswith("Make room, and run the same command again.\n")
        said.append(message)
        _check_nothing_half(here, before)
    assert any("checkpoints/step-00000004 could not be written" in text for text in said), said
    assert any("run.json could not be written" in text for text in said), said
    here.run(*TRAIN)
    _check_same(here, trained)


@pytest.mark.parametrize("size", [1, 2])
def test_metrics_that_cannot_grow(trained: Project, tmp_path: Path, size: int) -> None:
    """By a limit of the system: the file of metrics reaches it before any checkpoint does. Of
    several processes the first alone writes, and ends the others."""
    here = _copy(trained, tmp_path)
    lines = (_folder(here) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    _back_to(here, 2)
    change(here, checkpoint_step_interval=0, eval_steps_interval=0)
    change(here, gradient_accumulation_steps=2 // size)
    limit = sum(map(len, lines[:5])) + len(lines[5]) // 2
    assert (_folder(here) / "run.json").stat().st_size < limit
    full = partial(forked.limit_file_size, limit)
    if size == 1:
        children = [forked.start(here.root, *TRAIN, first=full)]
    else:
        children = forked.start_all(here.root, size, *TRAIN, first=full)
    ended = [child.ended(1) for child in children]
    assert all("Another process of this training ended" in _error(other) for other in ended[1:])
    message = _error(ended[0])
    assert "metrics.jsonl could not be written: File too large" in message
    _check_nothing_half(here, ["step-00000002"])
    change(here, gradient_accumulation_steps=2, eval_steps_interval=4)
    here.run(*TRAIN)
    _check_same(here, trained)


# What is not finite.


def test_a_learning_rate_beyond_reason_ends_with_what_is_still_good(
    trained: Project, tmp_path: Path
) -> None:
    here = _copy(trained, tmp_path)
    _back_to(here, 2)
    change(here, learning_rate=1e30, eval_steps_interval=0, checkpoint_step_interval=3)
    message = _error(here.run(*TRAIN, status=1))
    assert "The loss of step 4 is" in message
    assert "The step was not taken; the last checkpoint is of step" in message
    assert "Lower learning_rate" in message


def test_an_evaluation_that_is_not_finite_is_said(trained: Project, tmp_path: Path) -> None:
    here = _copy(trained, tmp_path)
    _back_to(here, 2)
    change(here, learning_rate=1e30, eval_steps_interval=1)
    message = _error(here.run(*TRAIN, status=1))
    assert "evaluation after step 3 gives no finite loss" in message
    assert _names(here) == ["step-00000002"]


def _only_of_the_second(here: Project) -> str:
    """A sample of step 3 that the second of two processes reads, and the first does not."""
    frozen = FrozenSamples.open(_folder(here) / "samples.arrow")
    position = read(_checkpoint(here, 2)).position
    config = Workspace.open(here.root).config.train
    batches = frozen.order(position.epoch, config, 2).global_batch(position.global_batch)
    first, second = ({int(i) for i in batch.samples} for batch in batches)
    return str(frozen.table["sample_id"][min(second - first)])


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_not_finite_names_step_sample_and_checkpoint(
    trained: Project, tmp_path: Path, size: int
) -> None:
    """Also where another process had the sample, and then it is said once."""
    here = _copy(trained, tmp_path)
    _back_to(here, 2)
    change(here, gradient_accumulation_steps=2 // size)
    sample = _only_of_the_second(here)
    spoil = partial(forked.spoil, sample)
    if size == 1:
        children = [forked.start(here.root, *TRAIN, first=spoil)]
    else:
        children = forked.start_all(here.root, size, *TRAIN, first=spoil)
    ended = [child.ended(1) for child in children]
    message = _error(ended[0])
    assert "The loss of step 3 is" in message
    assert "the last checkpoint is of step 2" in message
    assert f"Samples: {sample} (" in message
    assert all(other.stderr == "" for other in ended[1:])
    assert _names(here) == ["step-00000002"]
    if size == 1:
        here.run(*TRAIN)
        _check_same(here, trained)


# What is damaged.


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "ema.safetensors", "training.pt", "checkpoint.json"]
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    trained: Project, tmp_path: Path, name: str
) -> None:
    here = _copy(trained, tmp_path)
    path = _checkpoint(here, STEPS) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    summary = here.json(*TRAIN)
    assert summary["counts"]["steps now"] == 2
    notes = [note for note in summary["notes"] if note.startswith("Passed over")]
    assert len(notes) == 1
    assert f"step-{STEPS:08d}" in notes[0]
    _check_same(here, trained)


def test_frozen_samples_with_a_flipped_bit_are_refused(trained: Project, tmp_path: Path) -> None:
    here = _copy(trained, tmp_path)
    _back_to(here, 4)
    path = _folder(here) / "samples.arrow"
    good = path.read_bytes()
    for place in (0, 9, len(good) // 3, len(good) // 2, len(good) - 40, len(good) - 1):
        data = bytearray(good)
        data[place] ^= 1
        path.write_bytes(data)
        message = _error(here.run(*TRAIN, status=1))
        assert f"{path} is damaged" in message, place
        assert "another tracker_run_name" in message
    path.write_bytes(b"")
    _error(here.run(*TRAIN, status=1))
    path.write_bytes(good)
    here.run(*TRAIN)
    _check_same(here, trained)


def test_damaged_settings_of_a_run_are_refused(trained: Project, tmp_path: Path) -> None:
    here = _copy(trained, tmp_path)
    _back_to(here, 4)
    path = _folder(here) / "run.json"
    good = path.read_text()
    harmed = ["", good[:-30], "[]", "null", good.replace('"settings"', '"sittings"')]
    for name in ("settings", "free", "micro_batches", "samples", "conditions"):
        harmed += [json.dumps({**json.loads(good), name: wrong}) for wrong in (None, [1])]
    for text in harmed:
        path.write_text(text)
        message = _error(here.run(*TRAIN, status=1))
        assert f"{path} cannot be read" in message
        assert "another tracker_run_name" in message
    path.write_bytes(b"\xff" + good.encode())
    assert f"{path} cannot be read" in _error(here.run(*TRAIN, status=1))


# What was changed.


def test_changed_settings_are_listed_and_free_ones_are_said(
    trained: Project, tmp_path: Path
) -> None:
    """See test_run.py for every setting; here the command says it."""
    here = _copy(trained, tmp_path)
    _back_to(here, 4)
    change(here, seed=1, optimizer="lion", learning_rate=1e-4)
    message = _error(here.run(*TRAIN, status=2))
    assert "\n  optimizer: 'adamw' → 'lion'\n  seed: 42 → 1\n" in message
    assert "learning_rate" not in message
    change(here, seed=42, optimizer="adamw", learning_rate=1e-3, mixed_precision="bf16")
    assert "mixed_precision comes to bfloat16" in _error(here.run(*TRAIN, status=2))
    path = here.root / "omnigen-pipe.toml"
    change(here, mixed_precision="no", learning_rate=5e-4, gradient_accumulation_steps=5)
    text = path.read_text()
    path.write_text(text + "[lokr]\nfactor = 4\n")
    assert "\n  lokr.factor: 16 → 4\n" in _error(here.run(*TRAIN, status=2))
    path.write_text(text)
    summary = here.json(*TRAIN)
    assert "learning_rate was 0.001 and is 0.0005 from here on." in summary["notes"]
    assert any("stays at the 2 micro-batches" in note for note in summary["notes"])
    assert [m["learning_rate"] for m in metrics(here)[-2:]] == [5e-4, 5e-4]
    # The first of the two steps had the weights, draws and samples of the run that went on.
    assert losses(here)[:5] == losses(trained)[:5]


# Too little of something.


def test_nothing_to_train_on(project: Callable[..., Project], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    here = project(tmp_path / "empty")
    for stage in ("discover", "bucket", "encode-vae", "tokenize"):
        here.run(stage, status=None)
    message = _error(here.run(*TRAIN, status=1))
    assert "no sample to train on" in message
    assert not (here.root / "runs" / "default" / "checkpoints").exists()


def test_evaluation_without_a_dataset_for_it_says_what_to_do(
    prepared: Project, tmp_path: Path
) -> None:
    here = _copy(prepared, tmp_path)
    path = here.root / "omnigen-pipe.toml"
    before, _, after = path.read_text().partition('[[dataset]]\nid = "held-out"')
    path.write_text(before + after[after.index("[[dataset]]") :])
    here.run("discover")
    here.run("bucket")
    message = _error(here.run(*TRAIN, status=2))
    assert 'dataset_type = "eval"' in message
    assert "eval_steps_interval = 0" in message


def test_fewer_samples_than_a_batch_are_all_trained_equally_often(
    prepared: Project, tmp_path: Path
) -> None:
    """In short micro-batches, one per bucket: 7 pictures twice, and 2 of regularisation."""
    here = _copy(prepared, tmp_path)
    change(here, train_batch_size=64, max_train_steps=0, num_train_epochs=3, eval_steps_interval=0)
    here.run(*TRAIN)
    for epoch in range(3):
        lines = [line for line in metrics(here) if line["epoch"] == epoch]
        assert sum(line["samples"] for line in lines) == 2 * 7 + 2
        assert sum(line["regularisation_samples"] for line in lines) == 2


def test_regularisation_data_alone_can_be_trained_on(prepared: Project, tmp_path: Path) -> None:
    """The base model's own prediction is all there is to learn, and it is there from the start."""
    here = _copy(prepared, tmp_path)
    path = here.root / "omnigen-pipe.toml"
    text = path.read_text().replace('id = "main"', 'id = "main"\nis_regularisation_data = true')
    path.write_text(text)
    here.run("discover")
    here.run("bucket")
    change(here, max_train_steps=2)
    summary = here.json(*TRAIN)
    for line in metrics(here):
        assert line["regularisation_samples"] == line["samples"]
        assert line["loss"] == line["regularisation_loss"] < 1e-10
        assert line["baseline"] is None
        assert "rollout_samples" not in line
    assert summary["loss"] is None
    assert not any(note.strip().endswith("steps:") for note in summary["notes"])


# An adapter to start from.


@pytest.mark.parametrize(
    "source",
    ["file", *(pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoint", "run"))],
)
def test_a_run_starts_from_an_adapter_and_reads_it_only_once(
    trained: Project, tmp_path: Path, source: str
) -> None:
    """What it evaluates before its first step is what that adapter was evaluated at, to the bit;
    so is its average."""
    here = _copy(trained, tmp_path)
    given = tmp_path / "given"
    shutil.copytree(_folder(here), given)
    newest = given / "checkpoints" / f"step-{STEPS:08d}"
    place = {"file": newest / "adapter.safetensors", "checkpoint": newest, "run": given}[source]
    change(here, tracker_run_name="second", init_lora=str(place), max_train_steps=2)
    here.run(*TRAIN)
    last, first = evaluations(here)[-1], evaluations(here, "second")[0]
    assert (last["step"], first["step"]) == (STEPS, 0)
    assert first["losses"] == last["losses"] == first["ema"]["losses"]
    assert first["losses"] != evaluations(here)[0]["losses"]

    shutil.rmtree(given)
    change(here, max_train_steps=4)
    here.run(*TRAIN)
    assert len(metrics(here, "second")) == 4
    change(here, tracker_run_name="third")
    assert f"init_lora names {place}, which is not there" in _error(here.run(*TRAIN, status=2))


def test_going_on_from_a_checkpoint_forgets_the_adapter_it_started_from(
    trained: Project, tmp_path: Path
) -> None:
    here = _copy(trained, tmp_path)
    given = tmp_path / "given.safetensors"
    shutil.copy(_checkpoint(here, STEPS) / "adapter.safetensors", given)
    change(here, tracker_run_name="whole", init_lora=str(given))
    here.run(*TRAIN)
    change(here, tracker_run_name="parts", max_train_steps=2)
    here.run(*TRAIN)
    shutil.copy(_checkpoint(here, 2) / "adapter.safetensors", given)
    change(here, max_train_steps=STEPS)
    here.run(*TRAIN)
    assert metrics(here, "parts") == metrics(here, "whole")


@pytest.mark.parametrize(
    ("lokr", "words"),
    [
        ("linear_dim = 2", "another shape"),
        ('[lokr.apply_preset]\ntarget_module = ["Attention"]', "does not ask for"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    trained: Project, tmp_path: Path, lokr: str, words: str
) -> None:
    """Also one that has more than is asked for: half of it would be lost unsaid."""
    here = _copy(trained, tmp_path)
    change(here, tracker_run_name="second", init_lora="runs/default", max_train_steps=1)
    path = here.root / "omnigen-pipe.toml"
    text = path.read_text()
    path.write_text(f"{text}[lokr]\n{lokr}\n")
    message = _error(here.run(*TRAIN, status=2))
    assert "adapter.safetensors does not fit" in message
    assert words in message
    path.write_text(text)  # nothing was begun
    here.run(*TRAIN)


def test_an_adapter_of_another_scale_is_refused(prepared: Project, tmp_path: Path) -> None:
    """Of the same shapes it would compute something else."""
    here = _copy(prepared, tmp_path)
    path = here.root / "omnigen-pipe.toml"
    path.write_text(path.read_text() + "[lokr]\nlinear_dim = 2\nlinear_alpha = 2\n")
    change(here, eval_steps_interval=0, max_train_steps=1)
    here.run(*TRAIN)
    change(here, tracker_run_name="second", init_lora="runs/default")
    here.run(*TRAIN)
    change(here, tracker_run_name="third")
    path.write_text(path.read_text().replace("linear_alpha = 2", "linear_alpha = 1"))
    message = _error(here.run(*TRAIN, status=2))
    assert "alpha is 2, and the configuration makes it 1: set linear_alpha" in message


# Memory.


def test_too_little_memory_shows_before_the_first_step(prepared: Project, tmp_path: Path) -> None:
    here = _copy(prepared, tmp_path)
    change(here, eval_steps_interval=0)
    workspace = Workspace.open(here.root)
    child = forked.start(here.root, *TRAIN, first=partial(forked.little_memory, 500))
    message = _error(child.ended(1))
    frozen = FrozenSamples.open(_folder(here) / "samples.arrow")
    largest = largest_batch(frozen, workspace.config.train, 2)
    assert (
        f"2 samples of {largest.bucket} with {len(largest.prompts[0])} tokens, was tried before "
        "the first step"
    ) in message
    for advice in ("train_batch_size", "gradient_checkpointing", "base_model_precision"):
        assert advice in message
    assert not (_folder(here) / "metrics.jsonl").exists()
    # One sample fits where two do not: that is what the limit means.
    change(here, train_batch_size=1, max_train_steps=1)
    forked.start(here.root, *TRAIN, first=partial(forked.little_memory, 500)).ended()


def test_an_evaluation_that_finds_too_little_memory_says_so(
    prepared: Project, tmp_path: Path
) -> None:
    """It takes two times at once, and without checkpointing needs less than training does."""
    here = _copy(prepared, tmp_path)
    change(here, train_batch_size=1)
    child = forked.start(here.root, *TRAIN, first=partial(forked.little_memory, 500))
    assert "ran out of memory in the evaluation of an image of 64x64" in _error(child.ended(1))


def test_a_passing_rehearsal_changes_no_number(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = _copy(trained, tmp_path)
    shutil.rmtree(_folder(here))
    monkeypatch.setattr(session, "rehearse", lambda *_: None)
    here.run(*TRAIN)
    _check_same(here, trained)


@pytest.fixture
def surroundings() -> Iterator[None]:
    """The environment without what says how torch allocates, and afterwards as it was."""
    with mock.patch.dict(os.environ):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_memory_grows_in_segments_unless_the_user_says_otherwise(
    surroundings: None, given: dict[str, str], expected: str | None
) -> None:
    os.environ |= given
    with mock.patch("sys.argv", ["omnigen-pipe", "--help"]), pytest.raises(SystemExit):
        main()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
