"""The embedded model's making: it can be stopped anywhere, and goes on to the same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import forked
import pyarrow as pa
import pytest
import torch
from small_making import MAKING, little, start

from manifests.errors import PipeError, UsageError
from omnigen_pipe.embedded import make
from omnigen_pipe.embedded.make import StageFailed, run_stage
from omnigen_pipe.embedded.making import LOCK_NAME, PLAN_NAME, Making, begun
from omnigen_pipe.embedded.pretraining import load_transformer
from omnigen_pipe.embedded.recipe import recipe
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs import frozen
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.stop import Stopped, stopped_by_signal
from omnigen_pipe.workspace import Workspace

EMBEDDED = "omnigen_pipe.embedded"
CPU = torch.device("cpu")
#: From the beginning to the end: calls before which the making is killed or stopped.
PLACES = [
    (f"{EMBEDDED}.make:note_versions", 1),
    (f"{EMBEDDED}.make:build_tokenizer", 1),
    (f"{EMBEDDED}.autoencoder:new_vae", 1),
    (f"{EMBEDDED}.autoencoder:_losses", 4),
    (f"{EMBEDDED}.autoencoder:psnr", 1),
    (f"{EMBEDDED}.pretraining:new_transformer", 1),
    (f"{EMBEDDED}.learned:save", 7),
    (f"{EMBEDDED}.learned:publishing", 3),
    (f"{EMBEDDED}.make:run_stage", 1),
    (f"{EMBEDDED}.make:run_stage", 2),
    (f"{EMBEDDED}.make:run_stage", 3),
    (f"{EMBEDDED}.make:run_stage", 4),
    (f"{EMBEDDED}.pretraining:freeze_today", 1),
    (f"{EMBEDDED}.pretraining:save_state", 1),
    ("omnigen_pipe.training.loop:learning_rate", 4),
    (f"{EMBEDDED}.make:write_scheduler_and_index", 1),
    (f"{EMBEDDED}.card:draw_scenes", 1),
    (f"{EMBEDDED}.card:publishing", 1),
]
#: Kills at random moments before a making is let come to its end.
MOST_KILLS = 12


def files(finished: Path) -> dict[str, bytes]:
    """Every file of the finished model."""
    found = [path for path in finished.rglob("*") if path.is_file()]
    return {str(path.relative_to(finished)): path.read_bytes() for path in found}


def losses(folder: Path) -> list[tuple[int, float]]:
    """The steps of the pretraining, and what was measured at each."""
    lines = (folder / "runs/pretraining/metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def check_same(folder: Path, straight: Path) -> None:
    """What came of a disturbed making is what came of the undisturbed one, to the last byte."""
    assert files(folder / "finished") == files(straight / "finished")
    assert losses(folder) == losses(straight)


def killed_at(folder: Path, place: str, call: int) -> None:
    """Make `folder` up to there."""
    start(folder, partial(forked.signal_at, place, call)).ended(-signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a making that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "w"
    start(folder).ended()
    return folder


@pytest.mark.slow
def test_what_is_made_is_a_model(straight: Path) -> None:
    finished = straight / "finished"
    names = {path.name for path in finished.iterdir()}
    assert {"transformer", "vae", "tokenizer", "scheduler", "model_index.json"} <= names
    source = Source(str(finished), Path("/"))
    assert source.settings().size == "64x64"
    made = source.pipeline(source.tokenizer(), CPU, torch.float32).transformer.state_dict()
    untrained = load_transformer(straight / "model/transformer", torch.float32, CPU).state_dict()
    assert made.keys() == untrained.keys()
    assert any(not torch.equal(made[name], untrained[name].half().float()) for name in made)
    assert [step for step, _ in losses(straight)] == [1, 2, 3, 4, 5]
    assert Workspace.open(straight).config.train.max_train_steps == 5
    for path in finished.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
        assert path.is_dir() or str(straight).encode() not in path.read_bytes()


@pytest.mark.slow
def test_the_card_says_what_was_done(straight: Path) -> None:
    card = " ".join((straight / "finished/README.md").read_text().split())
    assert "seed 1: 5 steps of the VAE, 12 pictures and 5 steps of the transformer" in card
    assert f"with torch {torch.__version__} and diffusers" in card
    assert "Judged by 4 sentences" in card


@pytest.mark.slow
def test_killed_at_every_part_it_goes_on_to_the_same_model(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "w"
    for place, call in PLACES:
        killed_at(folder, place, call)
        finished = folder / "finished"
        if finished.exists():
            assert {*files(finished), "README.md"} == set(files(straight / "finished"))
    start(folder).ended()
    check_same(folder, straight)
    assert not list((folder / "staging").iterdir())

    def written() -> dict[Path, int]:
        found = (path for path in folder.rglob("*") if path.name != LOCK_NAME)
        return {path: path.stat().st_mtime_ns for path in found}

    before = written()
    start(folder).ended()
    assert written() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_goes_on_to_the_same_model(
    tmp_path: Path, straight: Path, seed: int
) -> None:
    draw = random.Random(seed)
    for kills in range(MOST_KILLS):
        child = start(tmp_path / "w", partial(forked.kill_at, draw.randint(1, 150)))
        if child.ended(None).status != -signal.SIGKILL:
            assert kills > 1
            break
    start(tmp_path / "w").ended()
    check_same(tmp_path / "w", straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_says_so_and_goes_on_to_the_same_model(
    tmp_path: Path, straight: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "w"
    for place, call in PLACES:
        # The stop before this one was in the training, too: there are two steps left.
        left = 1 if place.endswith(":learning_rate") else call
        child = start(folder, partial(forked.signal_at, place, left, number))
        ended = child.ended(128 + number)
        assert f"Stopped by {number.name}" in ended.stderr
        assert "run the same command again" in ended.stderr
    assert not list((folder / "staging").iterdir())
    start(folder).ended()
    check_same(folder, straight)


@pytest.mark.slow
def test_a_stopped_training_loses_no_step(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for place, name in (
        (f"{EMBEDDED}.autoencoder:_losses", "vae.pt"),
        ("omnigen_pipe.training.loop:sample_losses", "pretraining.pt"),
    ):
        start(folder, partial(forked.signal_at, place, 3, signal.SIGTERM)).ended(143)
        assert torch.load(folder / name, weights_only=True)["step"] == 3


@pytest.mark.slow
def test_a_picture_that_is_lost_is_not_passed_over(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "w"
    killed_at(folder, f"{EMBEDDED}.make:run_stage", 1)
    (folder / "pictures/000003.png").write_bytes(b"torn")
    for _ in range(2):
        stderr = start(folder).ended(1).stderr
        assert "11 samples" in stderr
        assert "12 pictures" in stderr
        assert str(folder / "captions.jsonl") in stderr
    (folder / "captions.jsonl").unlink()
    start(folder).ended()
    # The picture is encoded in a batch of its own now, so last bits may differ.
    for (step, loss), (its_step, its_loss) in zip(losses(folder), losses(straight), strict=True):
        assert step == its_step
        assert loss == pytest.approx(its_loss, rel=1e-3)


@pytest.mark.slow
def test_a_pretraining_goes_on_with_its_own_samples_only(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "w"
    killed_at(folder, f"{EMBEDDED}.pretraining:save_state", 2)
    samples = folder / "runs/pretraining/samples.arrow"
    content = samples.read_bytes()
    samples.unlink()
    assert f"{samples}, on which it was trained, is gone" in start(folder).ended(1).stderr
    samples.write_bytes(content)
    table, metadata = frozen.read(samples)
    turned = table.take(pa.array(reversed(range(len(table)))))
    frozen.freeze(turned, samples, folder / "staging", metadata)
    stderr = start(folder).ended(1).stderr
    assert f"{folder / 'pretraining.pt'} was saved in training on" in stderr
    samples.write_bytes(content)
    start(folder).ended()
    check_same(folder, straight)


@pytest.mark.slow
def test_a_card_is_written_again(tmp_path: Path, straight: Path) -> None:
    model = shutil.copytree(straight / "finished", tmp_path / "model")
    card = (model / "README.md").read_bytes()
    (model / "README.md").write_text("old\n")
    program = f"{EMBEDDED}.make"
    forked.start(tmp_path, str(model), "--card", first=little, program=program).ended()
    assert (model / "README.md").read_bytes() == card
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model"]


def run_script(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run a stage whose command is this script."""

    def command(stage: str, folder: Path) -> Sequence[str]:
        return [sys.executable, "-c", script]

    monkeypatch.setattr(make, "_command", command)
    with tempfile.TemporaryFile() as lock:
        run_stage("bucket", Path("/"), lock.fileno())


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(7)", 7, "failed with status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by SIGKILL"),
    ],
)
def test_a_failing_stage_is_named_and_its_status_passed_on(
    monkeypatch: pytest.MonkeyPatch, end: str, status: int, words: str
) -> None:
    with pytest.raises(StageFailed, match=words) as raised:
        run_script(monkeypatch, f"import os, signal, sys; {end}")
    assert "`bucket`" in str(raised.value)
    assert raised.value.exit_status == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_once_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    told = tmp_path / "told"
    script = f"""
import os, signal, sys
def stop(number, frame):
    with open({str(told)!r}, "a") as file:
        file.write(f"{{number}} ")
    sys.exit(1)
signal.signal({number:d}, stop)
os.kill(os.getppid(), {number:d})
while True:
    signal.pause()
"""
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as raised, stopped_by_signal():
        run_script(monkeypatch, script)
    assert raised.value.signal == number
    assert told.read_text() == f"{number:d} "
    assert signal.getsignal(number) is before


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["make", *arguments])
    with pytest.raises(SystemExit) as raised:
        make.main()
    assert isinstance(raised.value.code, int)
    return raised.value.code


def test_errors_are_a_sentence_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "w"
    with begun(folder, Making(seed=1), recipe(Making(seed=1))):
        pass
    assert main(monkeypatch, str(folder), "--seed", "2") == 2
    assert capsys.readouterr().err.startswith(f"Error: {folder} was begun with --seed 1 ")
    assert main(monkeypatch, str(folder), "--steps", "0") == 2
    assert "0 is not within 1 … " in capsys.readouterr().err

    def fail(*arguments: object) -> None:
        raise StageFailed("discover", 3)

    monkeypatch.setattr(make, "_make_parts", fail)
    assert main(monkeypatch, str(folder), "--seed", "1") == 3
    assert capsys.readouterr().err.startswith("Error: The stage `discover` failed with status 3")
    (folder / PLAN_NAME).write_text("{")
    assert main(monkeypatch, str(folder), "--seed", "1") == 1
    assert f"Error: {folder / PLAN_NAME} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_a_seed_that_torch_does_not_take_is_told_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: str,
) -> None:
    assert main(monkeypatch, str(tmp_path / "w"), "--seed", seed) == 2
    assert f"argument --seed: {seed} is not within 0 … {2**62}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failing_part_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        (path / "half").touch()
        raise PipeError("no")

    with pytest.raises(PipeError, match="no"):
        make._once(tmp_path / "part", tmp_path / "staging", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]
    assert not os.listdir(tmp_path / "staging")


def test_a_second_making_says_who_makes_already(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    command = [sys.executable, "-m", f"{EMBEDDED}.make", str(folder), *MAKING.options().split()]
    with begun(folder, MAKING, recipe(MAKING)):
        (folder / "staging" / "1-vae").touch()
        ended = subprocess.run(command, cwd=forked.ROOT, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"Error: A model is being made in {folder} now: ")
        assert f"process {os.getpid()} on " in ended.stderr
        assert (folder / "staging" / "1-vae").exists()


#: Begins a making in the folder that it is given, and does this there.
_MAKER = """
import os, signal, sys
from pathlib import Path
from omnigen_pipe.embedded import make
from omnigen_pipe.embedded.making import Making, begun
from omnigen_pipe.embedded.recipe import recipe

folder = Path(sys.argv[1])
with begun(folder, Making(), recipe(Making())) as lock:
    {}
"""


def maker(folder: Path, does: str) -> subprocess.Popen[str]:
    """Start a making in a process of its own, which `does` this."""
    return subprocess.Popen(
        [sys.executable, "-c", _MAKER.format(does), str(folder)],
        cwd=forked.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_making_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "w"
    does = """
    def write(path):
        (path / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    make._once(folder / "model" / "vae", folder / "staging", write)
    """
    with maker(folder, does) as killed:
        assert killed.wait() == -signal.SIGKILL
    (left,) = (folder / "staging").iterdir()
    assert [path.name for path in left.iterdir()] == ["half"]
    seen = []

    def parts(folder: Path, *others: object) -> None:
        seen.append(list((folder / "staging").iterdir()))
        raise PipeError("enough")

    monkeypatch.setattr(make, "_make_parts", parts)
    with pytest.raises(PipeError, match="enough"):
        make.make(folder, Making(), Progress(quiet=True))
    assert seen == [[]]


def test_a_stage_that_outlives_its_making_keeps_others_out(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    does = """
    stage = "import os; print(os.getpid(), flush=True); input()"
    make._command = lambda *_: [sys.executable, "-c", stage]
    make.run_stage("discover", folder, lock)
    """
    with maker(folder, does) as making:
        assert making.stdout is not None
        assert making.stdin is not None
        stage = int(making.stdout.readline())
        making.kill()
        making.wait()
        (folder / "staging" / "1-images.parquet").touch()
        with (
            pytest.raises(UsageError, match=f": process {stage} on "),
            begun(folder, Making(), recipe(Making())),
        ):
            pass
        assert (folder / "staging" / "1-images.parquet").exists(), "the stage may be writing it"
        making.stdin.close()  # the stage ends
        making.stdout.read()
        deadline = time.monotonic() + 60
        while True:
            try:
                with begun(folder, Making(), recipe(Making())):
                    assert not list((folder / "staging").iterdir())
                break
            except UsageError:
                assert time.monotonic() < deadline


def test_a_folder_begun_otherwise_is_not_touched(tmp_path: Path) -> None:
    with begun(tmp_path / "w", MAKING, recipe(MAKING)):
        pass
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="--seed 1"):
        make.make(tmp_path / "w", Making(), Progress(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
