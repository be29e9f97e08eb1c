"""The commented configuration: whole, valid, and valid again with every key switched on."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.config import Config, DatasetConfig, DatasetOptions, WebhookConfig
from omnigen_pipe.starting.answers import configured, dataset_ids
from omnigen_pipe.starting.configuration_file import render, toml_value, write
from omnigen_pipe.starting.folders import from_workspace
from omnigen_pipe.starting.questions import answered

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def default_values() -> dict[str, Any]:
    return configured(answered({}, None), Path("/project"), Path("/project"))


def switched_on(text: str) -> str:
    """The file with the `#` of every key taken away."""
    return re.sub(r"^#(?! )", "", text, flags=re.MULTILINE)


def tables(model: type[BaseModel], path: str = "") -> dict[str, type[BaseModel]]:
    """Every table of the configuration by its path."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[path + name] = field.annotation
            found.update(tables(field.annotation, f"{path}{name}."))
    return found


def test_it_loads_and_sets_exactly_the_values(tmp_path: Path) -> None:
    values = default_values()
    path = write(tmp_path / "new", values)
    assert tomllib.loads(path.read_text()) == {
        **{n: {} for n in Config.model_fields if n not in values and n != "webhook"},
        **values,
        "lokr": {"apply_preset": {}},
    }
    assert config.load(path).model_dump() == config.parse(values, "test").model_dump()


def test_every_key_is_there_with_its_meaning() -> None:
    raw = tomllib.loads(switched_on(render(default_values())))
    assert set(raw) == set(Config.model_fields)
    assert set(raw["defaults"]) == set(DatasetOptions.model_fields)
    own = set(DatasetConfig.model_fields) - set(DatasetOptions.model_fields)
    assert own <= set(raw["dataset"][0])
    for path, model in tables(Config).items():
        table: Any = raw
        for step in path.split("."):
            table = table[step]
        assert set(table) == set(model.model_fields), path
    assert set(raw["webhook"][0]) == set(WebhookConfig.model_fields) - {"url"}
    flat = " ".join(render(default_values()).replace("\n# ", " ").split())
    for model in [*tables(Config).values(), DatasetConfig, WebhookConfig]:
        for name, field in model.model_fields.items():
            if field.annotation in tables(Config).values():
                continue  # a table of its own, which says itself what it is
            assert " ".join((field.description or name).split()) in flat, name


@pytest.mark.parametrize("values", [default_values(), {}, {"train": {"seed": 1}}])
def test_switching_every_key_on_leaves_a_valid_file(values: dict[str, Any]) -> None:
    on = config.parse(tomllib.loads(switched_on(render(values))), "test")
    off = config.parse(tomllib.loads(render(values)), "test")
    assert on.train.max_train_steps == off.train.max_train_steps
    for name, field in DatasetOptions.model_fields.items():
        if field.default is not None:
            default = values.get("defaults", {}).get(name, field.default)
            assert getattr(on.defaults, name) == default, name


def test_comments_say_what_is_chosen_from() -> None:
    text = " ".join(render({}).replace("\n# ", " ").split())
    assert "`instanceprompt`" in text
    assert "Kronecker factor of these modules" in text
    assert max(len(line) for line in render({}).splitlines()) <= 100


SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(VALUES)
def test_values_come_back_from_toml(value: Any) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}")["key"] == value


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_survives_the_file(text: str) -> None:
    values = {"validation": {"validation_prompt": text}}
    assert tomllib.loads(render(values))["validation"]["validation_prompt"] == text


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, default_values())
    path.write_text("mine")
    with pytest.raises(UsageError, match="never overwritten"):
        write(tmp_path, default_values())
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"resolution": 5000}, "limit is 3072"),
        ({"caption_strategy": "guess"}, "caption_strategy"),
        ({"run_name": "../up"}, "tracker_run_name"),
        ({"images": "\udcff"}, "UTF-8"),
    ],
)
def test_a_wrong_answer_is_named_and_nothing_is_written(
    tmp_path: Path, answers: dict[str, Any], message: str
) -> None:
    root = tmp_path / "new"
    with pytest.raises(UsageError, match=message):
        write(root, configured(answered(answers, None), root, tmp_path))
    assert not root.exists()


def test_the_folder_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        write(tmp_path / "file", default_values())


def test_what_is_given_is_not_asked() -> None:
    asked = []

    def ask(question: Any) -> Any:
        asked.append(question.name)
        return question.default

    answers = answered({"images": "x", "resolution": 512, "model": None}, ask)
    assert "images" not in asked
    assert "resolution" not in asked
    assert "model" in asked
    assert "instance_prompt" not in asked
    assert [each.images for each in answers.datasets] == ["x"]
    asked.clear()
    answers = answered({"caption_strategy": "instanceprompt"}, ask)
    assert answers.datasets[0].instance_prompt
    assert "instance_prompt" in asked


def test_paths_start_at_the_workspace_or_are_absolute(tmp_path: Path) -> None:
    root = tmp_path / "project"
    assert from_workspace("project/images", root, tmp_path) == "images"
    assert from_workspace("../elsewhere", root, tmp_path) == str(tmp_path.parent / "elsewhere")
    assert from_workspace("images", root, tmp_path) == str(tmp_path / "images")
    assert from_workspace("hf://datasets/a/b", root, tmp_path) == "hf://datasets/a/b"


def test_a_folder_called_embedded_is_not_taken_for_the_embedded_model(tmp_path: Path) -> None:
    (tmp_path / "embedded").mkdir()
    for typed, written in [("embedded", "embedded"), ("./embedded", "./embedded")]:
        values = configured(answered({"model": typed}, None), tmp_path, tmp_path)
        assert values["model"]["pretrained_model_name_or_path"] == written


def test_the_default_folder_lies_in_the_workspace_unless_there_is_one_here(tmp_path: Path) -> None:
    root = tmp_path / "project"
    answers = answered({}, None)
    assert configured(answers, root, tmp_path)["dataset"][0]["instance_data_dir"] == "images"
    (tmp_path / "images").mkdir()
    there = configured(answers, root, tmp_path)["dataset"][0]["instance_data_dir"]
    assert there == str(tmp_path / "images")


def test_a_local_model_is_told_from_a_hub_id(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (tmp_path / "models" / "omnigen").mkdir(parents=True)
    for given_model, expected in (
        ("models/omnigen", str(tmp_path / "models" / "omnigen")),
        ("owner/omnigen", "owner/omnigen"),
    ):
        values = configured(answered({"model": given_model}, None), root, tmp_path)
        assert values["model"]["pretrained_model_name_or_path"] == expected


def test_dataset_ids_are_distinct_and_valid() -> None:
    ids = dataset_ids(["a/cats", "b/cats/", "My photos!", "/", "hf://datasets/o/n@main"])
    assert ids == ["cats", "cats-2", "My-photos", "images", "n"]
