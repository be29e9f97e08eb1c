"""`omnigen-pipe init` as a person or a script calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from omnigen_pipe import config
from omnigen_pipe.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["init", *arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_without_a_terminal_the_defaults_hold(here: Path) -> None:
    status, output = call("my project")
    assert status == 0
    assert "omnigen-pipe run -w 'my project'" in output
    written = config.load(here / "my project" / config.CONFIG_NAME)
    assert written.dataset[0].instance_data_dir == "images"


def test_flags_are_answers(here: Path) -> None:
    status, _ = call(
        *("-w", "p", "--images", "cats", "--images", "dogs", "--resolution", "512"),
        *("--caption-strategy", "instanceprompt", "--instance-prompt", "a cat", "--model", "o/m"),
        *("--run-name", "r", "--max-train-steps", "7", "--batch-size", "3"),
        *("--learning-rate", "2e-5", "--yes"),
    )
    assert status == 0
    written = config.load(here / "p" / config.CONFIG_NAME)
    assert [(d.id, d.instance_data_dir) for d in written.dataset] == [
        ("cats", str(here / "cats")),
        ("dogs", str(here / "dogs")),
    ]
    assert {d.instance_prompt for d in written.dataset} == {"a cat"}
    assert {d.resolution for d in written.dataset} == {512}
    train = written.train
    assert (train.tracker_run_name, train.max_train_steps) == ("r", 7)
    assert (train.train_batch_size, train.learning_rate) == (3, 2e-5)
    assert written.model.pretrained_model_name_or_path == "o/m"


def test_a_second_init_changes_nothing(here: Path) -> None:
    assert call()[0] == 0
    before = (here / config.CONFIG_NAME).read_bytes()
    status, output = call("--resolution", "512")
    assert status != 0
    assert "never overwritten" in output
    assert (here / config.CONFIG_NAME).read_bytes() == before


def test_json_is_only_json(here: Path) -> None:
    status, output = call("p", "--json")
    assert status == 0
    assert json.loads(output)["written"] == str(here / "p" / config.CONFIG_NAME)


def test_json_has_what_was_found_and_why_it_is_proposed(here: Path) -> None:
    (here / "cats").mkdir()
    for number in range(3):
        Image.new("RGB", (800, 800)).save(here / "cats" / f"IMG_{number}.png")
    (here / "cats" / "captions.csv").write_text(
        "file_name,text\nIMG_0.png,a cat\nIMG_1.png,two cats\n", encoding="utf-8"
    )
    (here / "cats" / "broken.jpg").write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["init", "p", "--images", "cats", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    (found,) = report["found"]
    assert (found["files"], found["usable"]) == (4, 3)
    assert found["faults"] == {"not an image": 1}
    assert found["shorter_side"] == [800, 800, 800]
    assert any(note.startswith("caption_strategy = csv: captions.csv") for note in report["notes"])
    (cats,) = config.load(here / "p" / config.CONFIG_NAME).dataset
    assert (cats.caption_strategy, cats.caption_column, cats.path_column) == (
        "csv",
        "text",
        "file_name",
    )
    assert cats.list_file == str(here / "cats" / "captions.csv")
    assert cats.resolution == 768


def test_options_win_over_what_would_be_proposed(here: Path) -> None:
    (here / "cats").mkdir()
    Image.new("RGB", (300, 300)).save(here / "cats" / "1.png")
    status, output = call(
        *("p", "--images", "cats", "--resolution", "1024", "--caption-strategy", "filename"),
        *("--repeats", "2", "--batch-size", "4", "--max-train-steps", "5"),
    )
    assert status == 0
    for name in ("resolution", "caption_strategy", "repeats", "train_batch_size"):
        assert f"{name} = " not in output
    written = config.load(here / "p" / config.CONFIG_NAME)
    (cats,) = written.dataset
    assert (cats.resolution, cats.caption_strategy, cats.repeats) == (1024, "filename", 2)
    assert (written.train.train_batch_size, written.train.max_train_steps) == (4, 5)


def simpletuner(here: Path) -> Path:
    (here / "config.json").write_text(
        '{"--data_backend_config": "data.json", "learning_rate": "1e-5", "push_to_hub": true}'
    )
    (here / "data.json").write_text('[{"id": "d", "instance_data_dir": "photos"}]')
    return here / "config.json"


def test_a_conversion_is_reported_as_a_table_and_as_json(here: Path) -> None:
    path = simpletuner(here)
    status, output = call("a", "--from-simpletuner", str(path))
    assert status == 0
    for words in ("push_to_hub", "not supported", "train.learning_rate", "working folder", "Wrote"):
        assert words in output
    result = CliRunner().invoke(app, ["init", "b", "--from-simpletuner", str(path), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [set(entry) for entry in report] == [
        {"file", "key", "value", "outcome", "target", "note"}
    ] * 5
    assert "working folder" in result.stderr
    assert config.load(here / "b" / config.CONFIG_NAME).train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-w", "b"], "give one of them"),
        (["--lycoris", "x.json"], "only go with --from-simpletuner"),
        (["--from-simpletuner", "config.json", "--batch-size", "2"], "--batch-size and"),
        (["--from-simpletuner", "nothing.json"], "nothing.json"),
        (["--caption-strategy", "instanceprompts"], "caption_strategy"),
    ],
)
def test_wrong_usage_writes_nothing(here: Path, arguments: list[str], message: str) -> None:
    simpletuner(here)
    status, output = call(*arguments)
    assert status != 0
    assert message in output
    assert not list(here.rglob(config.CONFIG_NAME))
