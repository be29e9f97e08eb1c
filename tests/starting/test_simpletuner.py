"""The guide's three files are converted, and no key of them is dropped without a word."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from guide import LYCORIS
from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.starting.configuration_file import write
from omnigen_pipe.starting.simpletuner import Conversion, Entry, Outcome, convert
from omnigen_pipe.starting.simpletuner_keys import PATHS, TABLES

GUIDE = Path(__file__).resolve().parents[3] / "shared" / "seed" / "omnigen-quickstart.pt.md"

#: The keys of the guide's files, and what must become of them.
CONFIG_OUTCOMES: dict[str, tuple[Any, Outcome]] = {
    "validation_torch_compile": ("false", "not needed"),
    "validation_step_interval": (200, "taken over"),
    "validation_seed": (42, "taken over"),
    "validation_resolution": ("1024x1024", "taken over"),
    "validation_prompt": ("A photo-realistic image of a cat", "taken over"),
    "validation_num_inference_steps": ("20", "taken over"),
    "validation_guidance": (2.0, "taken over"),
    "validation_guidance_rescale": ("0.0", "not needed"),
    "vae_cache_ondemand": (True, "not needed"),
    "vae_batch_size": (1, "taken over"),
    "train_batch_size": (1, "taken over"),
    "tracker_run_name": ("eval_loss_test1", "taken over"),
    "seed": (42, "taken over"),
    "resume_from_checkpoint": ("latest", "taken over"),
    "resolution": (1024, "taken over"),
    "resolution_type": ("pixel_area", "taken over"),
    "report_to": ("tensorboard", "taken over"),
    "output_dir": ("output/models-omnigen", "not needed"),
    "optimizer": ("adamw_bf16", "taken over"),
    "num_train_epochs": (0, "taken over"),
    "num_eval_images": (1, "taken over"),
    "model_type": ("lora", "not needed"),
    "model_family": ("omnigen", "not needed"),
    "mixed_precision": ("bf16", "taken over"),
    "minimum_image_size": (0, "taken over"),
    "max_train_steps": (10000, "taken over"),
    "max_grad_norm": (0.01, "taken over"),
    "lycoris_config": ("config/lycoris_config.json", "taken over"),
    "lr_warmup_steps": (100, "changed"),
    "lr_scheduler": ("constant", "taken over"),
    "lora_type": ("lycoris", "not needed"),
    "learning_rate": ("4e-5", "taken over"),
    "gradient_checkpointing": ("true", "taken over"),
    "grad_clip_method": ("value", "taken over"),
    "eval_steps_interval": (100, "taken over"),
    "disable_benchmark": (False, "not needed"),
    "data_backend_config": ("config/omnigen/multidatabackend.json", "taken over"),
    "checkpoints_total_limit": (5, "taken over"),
    "checkpoint_step_interval": (500, "taken over"),
    "caption_dropout_probability": (0.0, "taken over"),
    "base_model_precision": ("no_change", "taken over"),
    "aspect_bucket_rounding": (2, "taken over"),
}
CONFIG = {key: value for key, (value, _) in CONFIG_OUTCOMES.items()}

REGULARISATION: dict[str, Any] = {
    "id": "pseudo-camera-10k-omnigen",
    "type": "local",
    "crop": True,
    "crop_aspect": "square",
    "crop_style": "center",
    "resolution": 512,
    "minimum_image_size": 512,
    "maximum_image_size": 512,
    "target_downsample_size": 512,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae/omnigen/pseudo-camera-10k",
    "instance_data_dir": "datasets/pseudo-camera-10k",
    "disabled": False,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery",
    "repeats": 0,
    "is_regularisation_data": True,
}
SUBJECT: dict[str, Any] = {
    "id": "dreambooth-subject",
    "type": "local",
    "crop": False,
    "resolution": 1024,
    "instance_data_dir": "datasets/dreambooth-subject",
    "caption_strategy": "instanceprompt",
    "instance_prompt": "the name of your subject goes here",
    "metadata_backend": "discovery",
    "repeats": 1000,
    "vae_cache_clear_each_epoch": False,
}
EVAL: dict[str, Any] = {
    "id": "omnigen-eval",
    "type": "local",
    "dataset_type": "eval",
    "instance_data_dir": "/datasets/test_datasets/squares",
    "caption_strategy": "filename",
}
TEXT: dict[str, Any] = {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text/omnigen",
    "disabled": False,
    "write_batch_size": 128,
}


def lay_out(
    folder: Path,
    main: dict[str, Any] | None = None,
    datasets: list[dict[str, Any]] | None = None,
    lycoris: dict[str, Any] | None = None,
) -> Path:
    """SimpleTuner's folder as the guide describes it; returns config.json's path."""
    (folder / "config" / "omnigen").mkdir(parents=True)
    (folder / "config" / "config.json").write_text(json.dumps(CONFIG if main is None else main))
    dataloader = [REGULARISATION, SUBJECT, EVAL, TEXT] if datasets is None else datasets
    (folder / "config" / "omnigen" / "multidatabackend.json").write_text(json.dumps(dataloader))
    adapter = json.dumps(LYCORIS if lycoris is None else lycoris)
    (folder / "config" / "lycoris_config.json").write_text(adapter)
    return folder / "config" / "config.json"


def loaded(conversion: Conversion, root: Path) -> config.Config:
    return config.load(write(root, conversion.values))


def entries(conversion: Conversion, file: str) -> dict[str, Entry]:
    found = [entry for entry in conversion.report if entry.file == file]
    by_key = {entry.key: entry for entry in found}
    assert len(by_key) == len(found), "every key has one entry"
    return by_key


def flattened(raw: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of an object with those of the objects in it, as the report names them."""
    keys = set()
    for key, value in raw.items():
        keys |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


def test_every_key_of_the_guides_config_has_its_outcome(tmp_path: Path) -> None:
    conversion = convert(lay_out(tmp_path / "st"), tmp_path / "ws")
    found = entries(conversion, "config.json")
    assert {key: (e.value, e.outcome) for key, e in found.items()} == CONFIG_OUTCOMES
    for entry in conversion.report:
        assert entry.target or entry.note, f"{entry.key}: neither where to nor why not"
        assert (entry.target is not None) >= (entry.outcome in ("taken over", "changed"))


def test_every_key_of_the_other_files_has_an_outcome(tmp_path: Path) -> None:
    conversion = convert(lay_out(tmp_path / "st"), tmp_path / "ws")
    dataloader = entries(conversion, "multidatabackend.json")
    for dataset in (REGULARISATION, SUBJECT, EVAL, TEXT):
        for key in dataset:
            assert dataloader[f"{dataset['id']}: {key}"].outcome != "unknown"
    assert {e.outcome for k, e in dataloader.items() if k.startswith("text-embeds")} == {
        "not needed"
    }
    lycoris = entries(conversion, "lycoris_config.json")
    assert set(lycoris) == flattened(LYCORIS)
    assert lycoris["apply_preset.target_module"].outcome == "changed"
    assert "OmniGenFeedForward" in lycoris["apply_preset.target_module"].note


def test_the_values_arrive(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    converted = loaded(convert(lay_out(tmp_path / "st"), root), root)
    train = converted.train
    assert (train.learning_rate, train.max_train_steps, train.seed) == (4e-5, 10000, 42)
    assert (train.max_grad_norm, train.grad_clip_method) == (0.01, "value")
    assert train.gradient_checkpointing is True
    assert (train.checkpoints_total_limit, train.checkpoint_step_interval) == (5, 500)
    assert (train.tracker_run_name, train.caption_dropout_probability) == ("eval_loss_test1", 0)
    assert converted.vae.vae_batch_size == 1
    assert converted.validation.validation_prompt == "A photo-realistic image of a cat"
    assert converted.lokr == config.LokrConfig.model_validate(LYCORIS)
    regularisation, subject, evaluation = converted.datasets
    assert [d.split for d in converted.datasets] == ["regularisation", "train", "eval"]
    assert (regularisation.crop, regularisation.resolution) == (True, 512)
    assert (subject.repeats, subject.instance_prompt) == (1000, SUBJECT["instance_prompt"])
    assert evaluation.resolution == 1024, "from config.json's top level, through [defaults]"
    assert subject.instance_data_dir == str(tmp_path / "st/datasets/dreambooth-subject")
    assert evaluation.instance_data_dir == "/datasets/test_datasets/squares"


def test_the_guide_itself(tmp_path: Path) -> None:
    if not GUIDE.is_file():
        pytest.skip(f"the quickstart is not at {GUIDE}")
    blocks = []
    for text in re.findall(r"```json\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL):
        if not text.lstrip().startswith('"'):  # one block is a line to add to config.json
            blocks.append(json.loads(text))
    (main,) = (b for b in blocks if "model_family" in b)
    (lycoris,) = (b for b in blocks if "algo" in b)
    previews = next(b for b in blocks if "validation_preview" in b)
    library = next(b for b in blocks if "woman" in b)
    dataloaders = [b for b in blocks if isinstance(b, list)]
    assert len(dataloaders) == 2
    for number, datasets in enumerate(dataloaders):
        folder, root = tmp_path / f"st{number}", tmp_path / f"ws{number}"
        main = {**main, **previews, "--user_prompt_library": "config/user_prompt_library.json"}
        path = lay_out(folder, main, datasets, lycoris)
        (folder / "config" / "user_prompt_library.json").write_text(json.dumps(library))
        conversion = convert(path, root)
        keys = {(e.file, e.key) for e in conversion.report}
        expected = {("config.json", key) for key in main}
        expected |= {
            ("multidatabackend.json", f"{dataset['id']}: {key}")
            for dataset in datasets
            for key in dataset
        }
        expected |= {("lycoris_config.json", key) for key in flattened(lycoris)}
        assert keys == expected
        assert {e.outcome for e in conversion.report} <= set(get_args(Outcome)) - {"unknown"}
        converted = loaded(conversion, root)
        assert converted.validation.validation_preview
        assert converted.validation.validation_preview_steps == 1
        text_embeds = [d for d in datasets if d.get("dataset_type") == "text_embeds"]
        assert len(converted.dataset) == len(datasets) - len(text_embeds)
        assert converted.validation.user_prompt_library == str(
            folder / "config/user_prompt_library.json"
        )


def one(tmp_path: Path, **options: Any) -> tuple[Entry, config.Config]:
    """The entry of the first option, and the configuration, of a small config.json."""
    base = {"data_backend_config": "config/omnigen/multidatabackend.json"}
    conversion = convert(lay_out(tmp_path / "st", {**options, **base}, [SUBJECT]), tmp_path / "ws")
    return conversion.report[0], loaded(conversion, tmp_path / "ws")


@pytest.mark.parametrize(
    ("key", "value", "outcome", "note"),
    [
        ("use_ema", "true", "taken over", "stalls"),
        ("use_ema", False, "taken over", ""),
        ("validation_preview", "true", "taken over", "into files"),
        ("--validation_preview_steps", "5", "taken over", ""),
        ("evaluation_type", "clip", "taken over", "from 0 to 100"),
        ("evaluation_type", "none", "taken over", ""),
        ("evaluation_type", None, "not needed", "empty there"),
        ("evaluation_type", "fid", "not supported", "not possible here"),
        (
            "pretrained_evaluation_model_name_or_path",
            "openai/clip-vit-large-patch14-336",
            "taken over",
            "safetensors",
        ),
        ("ema_device", "cpu", "not needed", "every step"),
        ("scheduled_sampling_max_step_offset", 4, "without effect there", "needs both"),
        ("scheduled_sampling_strategy", "uniform", "not supported", "Euler"),
        ("optimizer", "bnb-lion8bit-paged", "taken over", ""),
        ("optimizer", "adamw_bf16", "taken over", "float32"),
        ("optimizer", "optimi-lion", "taken over", "lion here"),
        ("optimizer", "optimi-adamw", "changed", "adamw here; there with betas 0.9 and 0.99"),
        ("optimizer", "optimi-stableadamw", "changed", "not clipped"),
        ("optimizer", "adamw_schedulefree+no_kahan", "taken over", "adamw_schedulefree here"),
        ("optimizer", "prodigy", "changed", "learning_rate should be 1"),
        ("optimizer", "soap", "not supported", "'adamw' holds"),
        ("optimizer_config", "eps=1e-6", "not supported", "adam_epsilon"),
        ("lr_scheduler", "polynomial", "taken over", ""),
        ("lr_scheduler", "linear", "taken over", ""),
        ("lr_scheduler", "cosine", "changed", "a wave"),
        ("lr_scheduler", "cosine_with_restarts", "changed", "lr_num_cycles"),
        ("lr_scheduler", "sine", "not supported", "'constant' holds"),
        ("lr_end", "4e-7", "taken over", "linear, too"),
        ("report_to", "wandb", "taken over", ""),
        ("report_to", "tensorboard,wandb", "taken over", "all here"),
        ("report_to", "comet_ml", "not supported", "'tensorboard' holds"),
        ("tracker_project_name", "omni", "taken over", ""),
        ("validation_steps", 100, "without effect there", "no validation_prompt"),
        ("validation_resolution", 512, "taken over", ""),
        ("base_model_precision", "int8-quanto", "taken over", "linear layers"),
        ("base_model_precision", "fp8wo-torchao", "taken over", "linear layers"),
        ("base_model_precision", "int4-torchao", "not supported", "no backward pass"),
        ("base_model_precision", "int9-quanto", "not supported", "'no_change' holds"),
        ("quantize_via", "accelerator", "taken over", ""),
        ("quantize_via", "pipeline", "not supported", "'cpu' holds"),
        ("quantize_activations", True, "not supported", "become wrong"),
        ("quantize_activations", False, "not needed", "off there"),
        ("dynamo_backend", "INDUCTOR", "taken over", "inductor here"),
        ("dynamo_backend", False, "taken over", "no here"),
        ("dynamo_backend", "tensorrt", "not supported", "'no' holds"),
        ("dynamo_mode", "max-autotune", "not supported", "'default' holds"),
        ("dynamo_use_regional_compilation", True, "not needed", "block by block"),
        ("push_to_hub", True, "not supported", "without hub_model_id"),
        ("push_to_hub", False, "taken over", ""),
        ("push_checkpoints_to_hub", True, "without effect there", "without push_to_hub"),
        ("hub_model_id", "me/cats", "taken over", ""),
        ("model_card_private", "true", "taken over", ""),
        ("model_card_safe_for_work", True, "not supported", "model_card_note"),
        ("lora_type", "standard", "not supported", "LyCORIS"),
        ("model_type", "full", "not supported", "adapters"),
        ("flow_schedule_shift", 3, "without effect there", "fixed"),
        ("vae_cache_disable", "true", "not supported", "shards"),
        ("resume_from_checkpoint", "checkpoint-500", "not supported", "cannot be read"),
        ("never_heard_of", 1, "unknown", "no such option"),
        ("train_batch_size", "many", "not supported", "1 holds"),
        ("tracker_run_name", "my run / 2", "changed", "my-run-2"),
        ("lr_scheduler", "constant_with_warmup", "taken over", ""),
    ],
)
def test_options_of_their_own_kind(
    tmp_path: Path, key: str, value: Any, outcome: str, note: str
) -> None:
    entry, converted = one(tmp_path, **{key: value})
    assert (entry.key, entry.value, entry.outcome) == (key, value, outcome)
    shown = f"{entry.note} {converted.train.tracker_run_name}"
    assert note in shown


def test_a_base_model_that_cannot_be_compiled_is_not(tmp_path: Path) -> None:
    entry, converted = one(tmp_path, dynamo_backend="inductor", base_model_precision="int4-quanto")
    assert (entry.key, entry.outcome) == ("dynamo_backend", "not supported")
    assert "int4-quanto" in entry.note
    assert converted.train.base_model_precision == "int4-quanto"
    assert converted.train.dynamo_backend == "no"


#: Texts of the configuration that are no paths, or are none that the converter writes.
NO_PATHS = {
    *("tracker_run_name", "resume_from_checkpoint", "tracker_project_name", "revision"),
    *("lycoris_config", "validation_preview_model", "validation_preview_revision"),
    *("validation_prompt", "validation_negative_prompt", "validation_resolution"),
    *("pretrained_evaluation_model_revision", "hub_model_id", "model_card_license"),
    *("model_card_note", "caption_column", "path_column", "instance_prompt", "id"),
}


def test_every_key_that_is_a_path_is_moved() -> None:
    texts = {
        name
        for table in (*TABLES.values(), config.DatasetConfig)
        for name, info in table.model_fields.items()
        if str in (info.annotation, *get_args(info.annotation))
    }
    assert texts - NO_PATHS == PATHS
    assert texts >= NO_PATHS


def test_an_adapter_to_start_from_is_found_from_the_workspace(tmp_path: Path) -> None:
    entry, converted = one(tmp_path, init_lora="output/adapter.safetensors")
    assert converted.train.init_lora == str(tmp_path / "st" / "output/adapter.safetensors")
    assert "there is nothing at" in entry.note


@pytest.mark.parametrize("key", ["--learning_rate", "--learning-rate", "learning_rate"])
def test_dashes_and_texts_are_normalised(tmp_path: Path, key: str) -> None:
    entry, converted = one(tmp_path, **{key: "4e-5"})
    assert (entry.key, entry.target) == (key, "train.learning_rate")
    assert converted.train.learning_rate == 4e-5


def test_warm_up_is_taken_as_it_is_where_it_had_an_effect(tmp_path: Path) -> None:
    entry, converted = one(tmp_path, lr_warmup_steps="7", lr_scheduler="constant_with_warmup")
    assert entry.outcome == "taken over"
    assert converted.train.lr_warmup_steps == 7


def test_a_schedule_and_its_numbers_arrive(tmp_path: Path) -> None:
    numbers = {"lr_end": "4e-7", "lr_power": "2", "lr_num_cycles": 3}
    _, converted = one(tmp_path, lr_scheduler="polynomial", **numbers)
    train = converted.train
    assert (train.lr_scheduler, train.lr_end, train.lr_power) == ("polynomial", 4e-7, 2)
    assert train.lr_num_cycles == 3


def test_betas_go_to_the_optimizer_that_has_them(tmp_path: Path) -> None:
    betas = {"optimizer_beta1": "0.8", "optimizer_beta2": 0.95}
    entry, converted = one(tmp_path / "a", **betas, optimizer="optimi-lion")
    assert entry.target == "train.lion_beta1"
    assert (converted.train.optimizer, converted.train.lion_beta1) == ("lion", 0.8)
    assert (converted.train.lion_beta2, converted.train.adam_beta2) == (0.95, 0.999)
    _, converted = one(tmp_path / "b", **betas, optimizer="adamw_bf16")
    assert (converted.train.adam_beta1, converted.train.adam_beta2) == (0.8, 0.95)


def test_schedule_free_has_a_warm_up_and_no_schedule(tmp_path: Path) -> None:
    free = {"optimizer": "adamw_schedulefree+aggressive"}
    entry, converted = one(tmp_path / "a", lr_scheduler="cosine", **free)
    assert (entry.outcome, converted.train.lr_scheduler) == ("without effect there", "constant")
    entry, converted = one(tmp_path / "b", lr_warmup_steps=7, lr_scheduler="constant", **free)
    assert (entry.outcome, converted.train.lr_warmup_steps) == ("taken over", 7)
    assert converted.train.optimizer == "adamw_schedulefree"


def test_dropout_differs_only_when_there_is_some(tmp_path: Path) -> None:
    entry, converted = one(tmp_path, caption_dropout_probability="0.1")
    assert entry.outcome == "changed"
    assert "<cfg>" in entry.note
    assert converted.train.caption_dropout_probability == 0.1


def test_datasets_of_other_kinds(tmp_path: Path) -> None:
    datasets = [
        {**SUBJECT, "id": "cond", "dataset_type": "conditioning"},
        {**SUBJECT, "id": "bucket", "type": "aws"},
        {"id": "hub", "type": "huggingface", "dataset_name": "owner/photos"},
        {
            **SUBJECT,
            "id": "table one",
            "caption_strategy": "parquet",
            "metadata_backend": "parquet",
            "parquet": {
                "path": "datasets/captions.parquet",
                "filename_column": "file",
                "caption_column": "text",
                "width_column": "w",
            },
        },
    ]
    path = lay_out(tmp_path / "st", None, datasets)
    conversion = convert(path, tmp_path / "ws")
    found = entries(conversion, "multidatabackend.json")
    assert {e.outcome for k, e in found.items() if k.startswith(("cond:", "bucket:"))} == {
        "not supported"
    }
    assert found["table one: parquet.width_column"].outcome == "not supported"
    hub, table = loaded(conversion, tmp_path / "ws").dataset
    assert (hub.source, hub.instance_data_dir) == ("huggingface", "hf://datasets/owner/photos")
    assert (table.id, table.source) == ("table-one", "list")
    assert table.list_file == str(tmp_path / "st/datasets/captions.parquet")
    assert (table.path_column, table.caption_column) == ("file", "text")


def test_options_of_modules_are_checked_like_all_others(tmp_path: Path) -> None:
    modules = {"Attention": {"factor": "16"}, "FeedForward": {"factor": "many"}}
    lycoris = {**LYCORIS, "apply_preset": {"module_algo_map": modules}}
    conversion = convert(lay_out(tmp_path / "st", lycoris=lycoris), tmp_path / "ws")
    found = entries(conversion, "lycoris_config.json")
    prefix = "apply_preset.module_algo_map"
    assert found[f"{prefix}.Attention.factor"].outcome == "taken over"
    assert found[f"{prefix}.FeedForward.factor"].outcome == "not supported"
    preset = loaded(conversion, tmp_path / "ws").lokr.apply_preset
    assert preset.module_algo_map["Attention"].factor == 16
    assert preset.module_algo_map["FeedForward"].factor is None


def test_a_table_that_nothing_reads_is_left_out(tmp_path: Path) -> None:
    subject = {k: v for k, v in SUBJECT.items() if k != "caption_strategy"}
    datasets = [{**subject, "parquet": {"path": "captions.parquet"}}]
    conversion = convert(lay_out(tmp_path / "st", None, datasets), tmp_path / "ws")
    found = entries(conversion, "multidatabackend.json")
    assert found[f"{SUBJECT['id']}: parquet.path"].outcome == "without effect there"
    assert loaded(conversion, tmp_path / "ws").datasets[0].list_file is None

    main = {**CONFIG, "caption_strategy": "parquet"}
    conversion = convert(lay_out(tmp_path / "st2", main, datasets), tmp_path / "ws2")
    assert loaded(conversion, tmp_path / "ws2").datasets[0].list_file is not None


def test_files_beside_each_other_and_named_files(tmp_path: Path) -> None:
    st, root = tmp_path / "flat", tmp_path / "ws"
    st.mkdir()
    (st / "config.json").write_text(json.dumps(CONFIG))
    (st / "multidatabackend.json").write_text(json.dumps([SUBJECT]))
    (st / "lycoris_config.json").write_text(json.dumps(LYCORIS))
    beside = convert(st / "config.json", root)
    assert beside.values["dataset"][0]["instance_data_dir"] == str(
        st / "datasets/dreambooth-subject"
    )

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (st / "multidatabackend.json").rename(elsewhere / "data.json")
    with pytest.raises(UsageError, match="--dataloader"):
        convert(st / "config.json", root)
    named = convert(st / "config.json", root, dataloader=elsewhere / "data.json")
    assert named.values == beside.values
    moved = convert(
        st / "config.json", root, dataloader=elsewhere / "data.json", base=tmp_path / "ws"
    )
    assert moved.values["dataset"][0]["instance_data_dir"] == "datasets/dreambooth-subject"
    assert any("working folder" in note for note in moved.notes)


def test_what_is_not_in_the_files_is_said(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "st", {}, [])
    with pytest.raises(UsageError, match="--dataloader"):
        convert(path, tmp_path / "ws")
    dataloader = tmp_path / "st/config/omnigen/multidatabackend.json"
    notes = " ".join(convert(path, tmp_path / "ws", dataloader=dataloader).notes)
    for words in ("set one", "learning_rate = 0.0001", "No lycoris_config", "No dataset"):
        assert words in notes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "must hold an object"),
        ("config.json", '{"model_family": "flux"}', "only omnigen"),
        ("omnigen/multidatabackend.json", "{}", "a list of datasets"),
        ("omnigen/multidatabackend.json", '[{"id": "x"}]', "instance_data_dir"),
        ("lycoris_config.json", "nothing", "cannot be read as JSON"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = lay_out(tmp_path / "st")
    (tmp_path / "st" / "config" / name).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        convert(path, tmp_path / "ws")
    assert Path(name).name in str(caught.value)


def test_what_excludes_each_other_here_is_left_out_and_said(tmp_path: Path) -> None:
    options = {"use_ema": True, "optimizer": "adamw_schedulefree", "ema_decay": 0.99}
    options |= {"fsdp_enable": True, "base_model_precision": "int8-quanto"}
    base = {"data_backend_config": "config/omnigen/multidatabackend.json"}
    conversion = convert(lay_out(tmp_path / "st", {**options, **base}, [SUBJECT]), tmp_path / "ws")
    outcomes = {entry.key: entry.outcome for entry in conversion.report}
    for key in ("use_ema", "ema_decay", "fsdp_enable"):
        assert outcomes[key] == "not supported"
    train = loaded(conversion, tmp_path / "ws").train
    assert not train.use_ema
    assert not train.fsdp_enable
    assert train.base_model_precision == "int8-quanto"


def test_pushing_is_taken_over_where_it_says_where_to(tmp_path: Path) -> None:
    raw = {"push_to_hub": True, "push_checkpoints_to_hub": "true", "hub_model_id": "me/cats"}
    hub = one(tmp_path, **raw)[1].hub
    assert (hub.push_to_hub, hub.push_checkpoints_to_hub) == (True, True)
    assert hub.hub_model_id == "me/cats"


@pytest.mark.parametrize("form", ["file", "list", "text"])
def test_webhooks_are_taken_over_and_their_addresses_reported_nowhere(
    tmp_path: Path, form: str
) -> None:
    hooks = [
        {"webhook_type": "discord", "webhook_url": "https://discord.test/api/webhooks/1/s3cret"},
        {"webhook_type": "raw", "callback_url": "https://host.test/s3cret"},
    ]
    (tmp_path / "webhooks.json").write_text(json.dumps(hooks))
    given = {"file": "webhooks.json", "list": hooks, "text": json.dumps(hooks)}[form]
    entry, taken = one(tmp_path, webhook_config=given)
    assert (entry.outcome, entry.target) == ("changed", "[[webhook]]")
    assert "s3cret" not in str(entry)
    found = taken.webhook
    assert [hook.form for hook in found] == ["discord", "json"]
    assert [hook.url.get_secret_value() for hook in found if hook.url] == [
        hooks[0]["webhook_url"],
        hooks[1]["callback_url"],
    ]


@pytest.mark.parametrize("given", ['{"webhook_url": "s3cret', "https://host.test/s3cret"])
def test_a_webhook_that_cannot_be_read_is_not_shown(tmp_path: Path, given: str) -> None:
    entry, taken = one(tmp_path, webhook_config=given)
    assert entry.outcome == "not supported"
    assert "s3cret" not in str(entry)
    assert taken.webhook == ()


def test_excluded_modules_are_those_of_there(tmp_path: Path) -> None:
    lycoris = {**LYCORIS, "apply_preset": {"exclude_name": [r"layers\.1"]}}
    conversion = convert(lay_out(tmp_path / "st", lycoris=lycoris), tmp_path / "ws")
    found = entries(conversion, "lycoris_config.json")
    assert found["apply_preset.exclude_name"].outcome == "changed"
    (pattern,) = loaded(conversion, tmp_path / "ws").lokr.apply_preset.exclude_name
    assert re.fullmatch(pattern, "layers.10.mlp")
    assert not re.fullmatch(pattern, "layers.2.mlp")


def test_pictures_that_were_switched_off_stay_off(tmp_path: Path) -> None:
    options = {"validation_steps": 5, "validation_prompt": "a cat"}
    _, drawing = one(tmp_path / "a", **options)
    _, off = one(tmp_path / "b", **options, validation_disable=True)
    assert drawing.validation.validation_step_interval == 5
    assert off.validation.validation_step_interval == 0


def test_a_mask_dataset_becomes_the_mask_of_the_dataset_that_names_it(tmp_path: Path) -> None:
    masks = {
        "id": "subject-masks",
        "type": "local",
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": "alpha",
    }
    subject = {**SUBJECT, "conditioning_data": "subject-masks"}
    main = {**CONFIG, "masked_loss_probability": 0.5}
    for datasets in ([subject, masks], [masks, subject]):
        folder = tmp_path / str(datasets.index(masks))
        found = convert(lay_out(folder, main, datasets), folder)
        (dataset,) = found.values["dataset"]
        assert dataset["mask"] == "./alpha"
        config.parse(found.values, "test")
        outcomes = {entry.key: (entry.outcome, entry.target) for entry in found.report}
        assert outcomes["dreambooth-subject: conditioning_data"] == ("changed", "dataset.mask")
        assert outcomes["subject-masks: instance_data_dir"] == ("not needed", None)
        assert found.values["train"]["masked_loss_probability"] == 0.5
        assert outcomes["masked_loss_probability"] == ("changed", "train.masked_loss_probability")


def test_other_conditioning_is_still_not_supported(tmp_path: Path) -> None:
    control = {**SUBJECT, "id": "control", "dataset_type": "conditioning"}
    subject = {**SUBJECT, "conditioning_data": "control"}
    found = convert(lay_out(tmp_path, datasets=[subject, control]), tmp_path)
    outcomes = {entry.key: entry.outcome for entry in found.report}
    assert outcomes["dreambooth-subject: conditioning_data"] == "not supported"
    assert outcomes["control: instance_data_dir"] == "not supported"
    assert "mask" not in found.values["dataset"][0]
