"""The configuration: faults are named with file, key and the nearest known key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from guide import LYCORIS
from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig, load, parse, read_lycoris_config, square_side
from omnigen_pipe.precisions import REFUSED, BasePrecision

DATASET = {"id": "cats", "instance_data_dir": "cats"}


def test_an_empty_file_has_every_default() -> None:
    config = parse({}, "test")
    assert config.train.learning_rate == 1e-4
    assert config.datasets == ()


def test_defaults_reach_every_dataset_that_does_not_set_its_own() -> None:
    raw = {
        "defaults": {"resolution": 512, "repeats": 3},
        "dataset": [DATASET, {**DATASET, "id": "dogs", "repeats": 0}],
    }
    cats, dogs = parse(raw, "test").datasets
    assert (cats.resolution, cats.repeats) == (512, 3)
    assert (dogs.resolution, dogs.repeats) == (512, 0)


def test_disabled_datasets_are_left_out() -> None:
    config = parse({"dataset": [{**DATASET, "disabled": True}]}, "test")
    assert config.datasets == ()
    assert len(config.dataset) == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian": {}}, "unknown key `trian`; did you mean `train`"),
        ({"train": {"learning_rat": 1}}, "unknown key `train.learning_rat`; did you mean `lear"),
        ({"train": {"seed": "many"}}, "`train.seed` is 'many'"),
        (
            {"dataset": [{**DATASET, "crop_stile": 1}]},
            r"`dataset\[0\].crop_stile`; did you m",
        ),
        ({"dataset": [{"id": "cats"}]}, r"`dataset\[0\].instance_data_dir` is missing"),
        ({"dataset": [DATASET, DATASET]}, "two datasets have the id `cats`"),
        ({"defaults": {"resolutoin": 1}}, "`defaults.resolutoin`; did you mean `resolution`"),
        ({"defaults": {"id": "cats"}}, "unknown key `defaults.id`"),
        ({"defaults": {"repeats": -1}}, "`defaults.repeats` is -1"),
        ({"defaults": {"crop_aspect_buckets": [0]}}, r"`defaults.crop_aspect_buckets\[0\]` is 0"),
        ({"dataset": DATASET}, r"write \[\[dataset\]\]"),
        ({"dataset": [{**DATASET, "resolution": 4096}]}, "4096 px a side; OmniGen's limit is 3072"),
        ({"dataset": [{**DATASET, "resolution": 3104}]}, "3136 px a side"),
        ({"dataset": [{**DATASET, "resolution": 31.9}]}, "less than half of aspect_bucket_align"),
        ({"dataset": [{**DATASET, "resolution": 1e300}]}, r"1e\+300: .* equal to 1000000$"),
        ({"dataset": [{**DATASET, "repeats": 2**31 - 1}]}, "repeats` .* equal to 1000000$"),
        ({"dataset": [{**DATASET, "crop_aspect_buckets": [1, 0]}]}, r"buckets\[1\]` .* than 0"),
        ({"dataset": [{**DATASET, "resolution": 16, "resolution_type": "area"}]}, "limit is 3072"),
        ({"dataset": [{**DATASET, "aspect_bucket_alignment": 24}]}, "multiple of 16"),
        ({"dataset": [{**DATASET, "crop": True, "crop_aspect": "closest"}]}, "crop_aspect_buckets"),
        ({"dataset": [{**DATASET, "caption_strategy": "instanceprompt"}]}, "instance_prompt"),
        ({"dataset": [{**DATASET, "caption_strategy": "csv"}]}, "needs list_file"),
        (
            {"dataset": [{**DATASET, "caption_strategy": "textfile", "list_file": "a.csv"}]},
            'list_file has no effect with caption_strategy "textfile". Set caption_strategy to',
        ),
        ({"dataset": [{**DATASET, "crops_per_image": 2}]}, "crop_style"),
        ({"pixels": {"alpha_background": "whiteish"}}, "not a colour"),
        ({"train": {"seed": 2**63}}, "`train.seed`.* less than or equal to 9223372036854775807"),
        ({"train": {"base_model_precision": "int4-torchao"}}, "no backward pass. Take int4-quanto"),
        ({"train": {"base_model_precision": "int9"}}, "`train.base_model_precision` is 'int9'"),
        (
            {"train": {"base_model_precision": "int4-quanto", "dynamo_backend": "inductor"}},
            'Set dynamo_backend to "no", or take nf4-bnb',
        ),
        ({"train": {"dynamo_mode": "reduce-overhead"}}, "`train.dynamo_mode`"),
        ({"lokr": {"factor": 0}}, "LoKr factor is 1 or more, or -1 for near square, not 0"),
        (
            {"lokr": {"apply_preset": {"module_algo_map": {"Attention": {"fctor": 1}}}}},
            "`lokr.apply_preset.module_algo_map.Attention.fctor`; did you mean `factor`",
        ),
    ],
)
def test_a_fault_is_named_with_its_key_and_what_to_write(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(raw, "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("repeats", "3", "integer"),
        ("repeats", True, "integer"),
        ("repeats", 3.0, "integer"),
        ("resolution", "512", "number"),
        ("resolution", True, "number"),
        ("crop", "no", "boolean"),
        ("upscale", 1, "boolean"),
        ("crop_aspect_buckets", ["1.5"], "number"),
    ],
)
def test_a_value_of_another_type_is_not_guessed_at(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(UsageError, match=rf"`dataset\[0\].{key}.* valid {wanted}"):
        parse({"dataset": [{**DATASET, key: value}]}, "test")


#: `base_model_precision` of SimpleTuner 4.8, from its own list.
SIMPLETUNER_PRECISIONS = [
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "int2-quanto",
    "int8-torchao",
    "int8dq-torchao",
    "int8dq-int4-torchao",
    "int8-sdnq",
    "uint8-sdnq",
    "int16-sdnq",
    "uint16-sdnq",
    "fp16-sdnq",
    "fp8-sdnq",
    "int6-sdnq",
    "int5-sdnq",
    "uint5-sdnq",
    "uint4-sdnq",
    "uint3-sdnq",
    "uint2-sdnq",
    "nf4-bnb",
    "int4-torchao",
    "fp8-quanto",
    "fp8uz-quanto",
    "fp8-native",
    "fp8-torchao",
    "fp8wo-torchao",
    "fp8-int4-torchao",
    "fp8-transformerengine",
]


@pytest.mark.parametrize("name", SIMPLETUNER_PRECISIONS)
def test_every_precision_of_simpletuner_is_there_or_refused_with_a_reason(name: str) -> None:
    raw = {"train": {"base_model_precision": name}}
    if name in REFUSED:
        with pytest.raises(UsageError, match=r"Take [a-z0-9_-]+") as caught:
            parse(raw, "test")
        assert REFUSED[name] in str(caught.value)
        assert re.search(r"Take ([a-z0-9_-]+)", REFUSED[name])[1] in get_args(BasePrecision)  # type: ignore[index]
    else:
        taken = parse(raw, "test").train.base_model_precision
        assert taken in get_args(BasePrecision)
        assert taken == name.replace("fp8wo", "fp8")


def test_whole_numbers_are_numbers_and_lists_are_lists(tmp_path: Path) -> None:
    path = tmp_path / "omnigen-pipe.toml"
    path.write_text(
        '[[dataset]]\nid = "cats"\ninstance_data_dir = "cats"\nresolution = 512\n'
        "crop_aspect_buckets = [1, 1.5]\n[train]\nlearning_rate = 1\n"
        '[lokr.apply_preset]\ntarget_module = ["Attention"]\n'
        "module_algo_map.Attention.linear_alpha = 2\n"
    )
    config = load(path)
    assert config.datasets[0].resolution == 512
    assert config.datasets[0].crop_aspect_buckets == (1, 1.5)
    assert config.train.learning_rate == 1
    assert config.lokr.apply_preset.target_module == ("Attention",)
    assert config.lokr.apply_preset.module_algo_map["Attention"].linear_alpha == 2


@pytest.mark.parametrize("resolution_type", ["pixel", "pixel_area"])
def test_half_of_the_alignment_is_rounded_up_as_in_bucket(resolution_type: str) -> None:
    options = {"resolution": 32, "resolution_type": resolution_type}
    (dataset,) = parse({"dataset": [{**DATASET, **options}]}, "test").datasets
    assert square_side(dataset) == 64


@pytest.mark.parametrize("more", [{"caption_strategy": "csv"}, {"type": "list"}])
def test_a_list_is_for_captions_or_for_paths(more: dict[str, Any]) -> None:
    raw = {"dataset": [{**DATASET, "list_file": "a.csv", **more}]}
    assert parse(raw, "test").datasets[0].list_file == "a.csv"


def test_every_fault_of_a_file_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse({"trian": {}, "train": {"seed": -1}}, "test")
    assert len(str(caught.value).splitlines()) == 2


def test_a_fault_of_the_defaults_is_named_once_and_there() -> None:
    cats = {**DATASET, "crop_seed": -2}
    dogs = {**DATASET, "id": "dogs", "repeats": "many"}
    defaults = {"repeats": "3", "crop_style": "left", "crop_aspect_buckets": [0], "nope": 1}
    with pytest.raises(UsageError) as caught:
        parse({"defaults": defaults, "dataset": [cats, dogs]}, "test")
    named = [line.split("`")[1] for line in str(caught.value).splitlines()]
    assert sorted(named) == [
        "dataset[0].crop_seed",
        "dataset[1].repeats",
        "defaults.crop_aspect_buckets[0]",
        "defaults.crop_style",
        "defaults.nope",
        "defaults.repeats",
    ]


def test_files_that_are_no_toml_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="omnigen-pipe init"):
        load(tmp_path / "omnigen-pipe.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UsageError, match="not valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(UsageError, match="not UTF-8"):
        load(tmp_path / "latin.toml")


def test_the_guides_file_is_read_and_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lycoris_config.json"
    path.write_text(json.dumps(LYCORIS))
    assert read_lycoris_config(path) == LokrConfig()
    path.write_text(json.dumps({**LYCORIS, "factor": "16"}))
    with pytest.raises(UsageError, match="`factor` is '16'"):
        read_lycoris_config(path)
    path.write_text(json.dumps({**LYCORIS, "fctor": 4}))
    with pytest.raises(UsageError, match="unknown key `fctor`; did you mean `factor`"):
        read_lycoris_config(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_lycoris_config(path)


def test_a_factor_without_a_map_is_every_targets() -> None:
    """The default map would leave it without any effect."""
    assert LokrConfig().apply_preset.module_algo_map.keys() == {"Attention", "FeedForward"}
    alone = LokrConfig.model_validate({"factor": 4})
    assert alone.apply_preset.module_algo_map == {}
    assert alone.unused_factor() is None
    targets = {"factor": 4, "apply_preset": {"target_module": ["Attention"]}}
    assert LokrConfig.model_validate(targets).apply_preset.module_algo_map == {}


def test_a_factor_that_no_target_takes_is_said() -> None:
    maps = {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}}

    def said(factor: int, **classes: dict[str, int]) -> str | None:
        preset = {"module_algo_map": classes}
        config = LokrConfig.model_validate({"factor": factor, "apply_preset": preset})
        return config.unused_factor()

    assert "factor = 4 has no effect" in (said(4, **maps) or "")
    assert said(16, **maps) is None, "the guide's own file"
    assert said(4, Attention={"factor": 16}) is None, "FeedForward takes it"
    assert said(4, Attention={"factor": 16}, FeedForward={"linear_dim": 3}) is None
    assert LokrConfig().unused_factor() is None
