"""Checkpoints: whole or not there, damage is noticed, old ones go."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from manifests.errors import PipeError, UsageError, WriteError
from omnigen_pipe.config import LokrConfig, TrainConfig
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.run import Run
from omnigen_pipe.runs.terms import check_settings, frozen_settings


def _save(folder: Path, step: int) -> checkpoints.Checkpoint:
    def write(unfinished: Path) -> None:
        (unfinished / "adapter.safetensors").write_bytes(b"adapter of step %d" % step)
        (unfinished / "optimizer.pt").write_bytes(b"optimizer of step %d" % step)

    position = Position(step, epoch=1, global_batch=2)
    return checkpoints.save(folder / "checkpoints", folder / "staging", position, write)


def test_what_is_saved_is_found(tmp_path: Path) -> None:
    saved = _save(tmp_path, 7)
    found, skipped = checkpoints.latest(tmp_path / "checkpoints")
    assert found == saved
    assert skipped == []
    assert found.position == Position(7, 1, 2)
    assert set(found.hashes) == {"adapter.safetensors", "optimizer.pt"}
    assert found.adapter.read_bytes() == b"adapter of step 7"


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    good = _save(tmp_path, 5)

    def write(unfinished: Path) -> None:
        (unfinished / "adapter.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError, match="No space left"):
        checkpoints.save(tmp_path / "checkpoints", tmp_path / "staging", Position(9), write)
    assert checkpoints.names(tmp_path / "checkpoints") == [good.folder.name]
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"step": 1, "epoch": 0, "global_batch": 0}',
        '{"step": 1, "epoch": 0, "global_batch": 0, "blake3": {}}',
        '{"step": 1, "epoch": 0, "global_batch": 0, "blake3": []}',
        '{"step": 1, "epoch": 0, "global_batch": 0, "blake3": {"optimizer.pt": "0"}}',
        '{"step": 1, "epoch": 0, "global_batch": 0, "blake3": {"adapter.safetensors": "0", '
        '"../../run.json": "0"}}',
    ],
)
def test_an_index_of_another_shape_is_passed_over(tmp_path: Path, text: str) -> None:
    good, bad = _save(tmp_path, 5), _save(tmp_path, 10)
    (bad.folder / "checkpoint.json").write_text(text)
    found, skipped = checkpoints.latest(tmp_path / "checkpoints")
    assert found == good
    assert len(skipped) == 1


def test_nothing_is_left_in_staging(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, harm: str
) -> None:
    good, bad = _save(tmp_path, 5), _save(tmp_path, 10)
    victim = bad.folder / name
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 0xFF
        victim.write_bytes(data)
    elif harm == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        victim.unlink()
    found, skipped = checkpoints.latest(tmp_path / "checkpoints")
    assert found == good
    assert len(skipped) == 1
    assert "step-00000010" in skipped[0]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        _save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    assert checkpoints.prune(folder, tmp_path / "staging", 0) == []
    gone = checkpoints.prune(folder, tmp_path / "staging", 2)
    assert gone == ["step-00000001", "step-00000002"]
    assert checkpoints.names(folder) == ["step-00000004", "step-00000030"]


def test_a_run_goes_on_from_what_is_asked_for(tmp_path: Path) -> None:
    run = Run("r", tmp_path)
    assert run.resume_point("latest") == (None, [])
    first, second = _save(tmp_path, 5), _save(tmp_path, 10)
    assert run.resume_point("latest")[0] == second
    assert run.resume_point("step-00000010")[0] == second
    with pytest.raises(UsageError, match=r"after `step-00000005`.*step-00000010"):
        run.resume_point(first.folder.name)
    with pytest.raises(UsageError, match="no checkpoint `step-1`"):
        run.resume_point("step-1")
    with pytest.raises(UsageError, match="resume_from_checkpoint is"):
        run.resume_point("none")
    second.adapter.write_bytes(b"")
    with pytest.raises(PipeError, match="cannot be used"):
        run.resume_point("step-00000010")


def test_settings_that_give_a_run_its_meaning_are_held() -> None:
    frozen = frozen_settings(TrainConfig(), LokrConfig())
    check_settings("r", frozen, frozen_settings(TrainConfig(learning_rate=1.0), LokrConfig()))
    check_settings("r", frozen, frozen_settings(TrainConfig(max_train_steps=9), LokrConfig()))
    with pytest.raises(UsageError, match=r"train_batch_size: 1 → 4"):
        check_settings("r", frozen, frozen_settings(TrainConfig(train_batch_size=4), LokrConfig()))
    with pytest.raises(UsageError, match=r"\n  lokr\.factor: 16 → 4\n"):
        check_settings("r", frozen, frozen_settings(TrainConfig(), LokrConfig(factor=4)))


def test_a_setting_of_a_later_version_had_its_default() -> None:
    frozen = frozen_settings(TrainConfig(), LokrConfig())
    del frozen["adam_beta1"]
    check_settings("r", frozen, frozen_settings(TrainConfig(), LokrConfig()))
    with pytest.raises(UsageError, match=r"adam_beta1: 0\.9 → 0\.5"):
        check_settings("r", frozen, frozen_settings(TrainConfig(adam_beta1=0.5), LokrConfig()))


def test_a_class_added_to_the_algo_map_is_a_change_even_to_its_default_value() -> None:
    def settings(**classes: dict[str, int]) -> dict[str, object]:
        preset = {"module_algo_map": classes}
        lokr = LokrConfig.model_validate({"apply_preset": preset})
        return frozen_settings(TrainConfig(), lokr)

    frozen = settings(Attention={"factor": 16})
    check_settings("r", frozen, settings(Attention={"factor": 16}))
    with pytest.raises(UsageError, match=r"FeedForward\.factor: None → 8"):
        check_settings("r", frozen, settings(Attention={"factor": 16}, FeedForward={"factor": 8}))


@pytest.mark.parametrize("name", ["samples.arrow", "run.json"])
def test_checkpoints_without_what_they_were_trained_on_are_not_gone_on_from(
    tmp_path: Path, name: str
) -> None:
    run = Run("r", tmp_path)
    assert not run.has_begun()
    _save(tmp_path, 5)
    for present in ("samples.arrow", "run.json"):
        (tmp_path / present).touch()
    assert run.has_begun()
    (tmp_path / name).unlink()
    with pytest.raises(PipeError, match=rf"has checkpoints, but .*{name} is gone"):
        run.has_begun()


def test_checkpoints_passed_over_are_set_aside_and_never_count_as_newest(tmp_path: Path) -> None:
    folder, staging = tmp_path / "checkpoints", tmp_path / "staging"
    _save(tmp_path, 4)
    for _ in range(2):
        _save(tmp_path, 8).adapter.write_bytes(b"")
        assert checkpoints.set_aside(folder, after=4) == ["step-00000008"]
    saved = _save(tmp_path, 7)
    assert checkpoints.prune(folder, staging, 1) == ["step-00000004"]
    assert checkpoints.latest(folder) == (saved, [])
    kept = sorted(p.name for p in folder.iterdir())
    assert kept == ["damaged-0-step-00000008", "damaged-1-step-00000008", "step-00000007"]


def test_when_no_checkpoint_is_whole_nothing_begins_again_unasked(tmp_path: Path) -> None:
    _save(tmp_path, 4).adapter.write_bytes(b"")
    with pytest.raises(PipeError, match=r"No checkpoint of the run `r` is whole(.|\n)*step 0"):
        Run("r", tmp_path).resume_point("latest")


@pytest.mark.parametrize(
    ("entry", "value"),
    [("step", 4), ("step", "5"), ("step", -5), ("epoch", 0), ("global_batch", 9), ("seal", "0")],
)
def test_an_index_that_was_changed_is_passed_over(
    tmp_path: Path, entry: str, value: object
) -> None:
    """Going on from another position would repeat or leave out data without a word."""
    good, bad = _save(tmp_path, 3), _save(tmp_path, 5)
    path = bad.folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    found, skipped = checkpoints.latest(tmp_path / "checkpoints")
    assert found == good
    assert "not what was written" in skipped[0]


def test_a_renamed_checkpoint_is_not_of_another_step(tmp_path: Path) -> None:
    good, other = _save(tmp_path, 3), _save(tmp_path, 5)
    other.folder.rename(other.folder.with_name("step-00000007"))
    assert checkpoints.latest(tmp_path / "checkpoints")[0] == good


def test_no_adapter_is_taken_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    saved = _save(tmp_path, 3)
    assert checkpoints.locate_adapter(saved.folder) == (saved.adapter, [])
    saved.adapter.write_bytes(b"another")
    with pytest.raises(PipeError, match=r"cannot be used: adapter\.safetensors is damaged"):
        checkpoints.locate_adapter(saved.folder)
    assert checkpoints.locate_adapter(saved.adapter) == (saved.adapter, []), "a file is taken as is"


def test_a_run_s_adapter_comes_with_what_was_passed_over(tmp_path: Path) -> None:
    older, newer = _save(tmp_path, 3), _save(tmp_path, 5)
    assert checkpoints.locate_adapter(tmp_path) == (newer.adapter, [])
    newer.adapter.write_bytes(b"another")
    found, said = checkpoints.locate_adapter(tmp_path)
    assert found == older.adapter
    assert [str(newer.folder) in sentence for sentence in said] == [True]
    older.adapter.write_bytes(b"another")
    with pytest.raises(
        UsageError, match=r"no whole checkpoint in .*\n.*step-00000005.*\n.*damaged"
    ):
        checkpoints.locate_adapter(tmp_path)


def test_the_average_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    saved = _save(tmp_path, 3)
    for folder in (tmp_path, saved.folder):
        with pytest.raises(UsageError, match=r"holds no ema\.safetensors: the run has no average"):
            checkpoints.locate_adapter(folder, ema=True)
    saved.ema.write_bytes(b"average")
    for folder in (tmp_path, saved.folder):
        assert checkpoints.locate_adapter(folder, ema=True) == (saved.ema, [])
        assert checkpoints.locate_adapter(folder) == (saved.adapter, [])
    with pytest.raises(UsageError, match="without --ema"):
        checkpoints.locate_adapter(saved.adapter, ema=True)


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_not_there_is_no_adapter(tmp_path: Path, ema: bool) -> None:
    with pytest.raises(UsageError, match=r"There is no adapter .*gone\.safetensors"):
        checkpoints.locate_adapter(tmp_path / "gone.safetensors", ema)
