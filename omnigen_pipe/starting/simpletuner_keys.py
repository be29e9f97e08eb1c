"""SimpleTuner's keys: what each is here, or why it is not.

Keys of the same name are found in the configuration's own models; what else is known stands in
the tables below. Sources: SimpleTuner's OmniGen quickstart, and what its OmniGen path (version
4.8) does when it is run and read.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from omnigen_pipe.config import (
    DatasetOptions,
    HubConfig,
    ModelConfig,
    PromptsConfig,
    TrainConfig,
    VaeConfig,
    ValidationConfig,
)

Outcome = Literal[
    "taken over",  # the same here
    "changed",  # taken over, but it means or does something else here
    "not needed",  # nothing here needs it
    "without effect there",  # it did nothing there, and is not here
    "not supported",  # it did something there that cannot be done here yet
    "unknown",  # neither this converter nor this project knows it
]


#: Tables in which a key of config.json is looked for, in this order.
TABLES: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "vae": VaeConfig,
    "model": ModelConfig,
    "validation": ValidationConfig,
    "prompts": PromptsConfig,
    "hub": HubConfig,
    "defaults": DatasetOptions,
}

#: Other spellings there of keys that exist here.
SPELLINGS = {
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_steps": "validation_step_interval",
    "is_regularization_data": "is_regularisation_data",
    "disable": "disabled",
}

#: Keys whose values are paths.
PATHS = {
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_evaluation_model_name_or_path",
    "user_prompt_library",
    "init_lora",
    "instance_data_dir",
    "list_file",
    "mask",
}

#: Values that switch an option off.
OFF = (None, "", "false", "none", "no", "no_change", "0", "0.0", "[]", "{}")

#: Taken over, with a remark.
REMARKS = {
    "validation_step_interval": "there validation raised for OmniGen and nothing was drawn; here "
    "pictures are, which takes time",
    "aspect_bucket_rounding": "there buckets depended on the order of files; here they do not",
    "resume_from_checkpoint": "exact here; checkpoints of SimpleTuner cannot be read",
    "is_regularisation_data": "towards the base model's own prediction, as there",
    "repeats": "extra times per epoch, as there",
    "tracker_run_name": "also the name of the run's folder, runs/NAME",
    "minimum_image_size": "here every image that it leaves out is counted and listed",
    "target_downsample_size": "here also without maximum_image_size",
    "linear_dim": "at or above half of a factor's side, as 10000 is, it means full matrices",
    "linear_alpha": "no effect, there or here, on full matrices",
    "use_ema": "in float32 here, evaluated and saved beside the adapter; in bfloat16 it stalls",
    "eval_steps_interval": "there all times collapsed to one; here on a fixed grid of t",
    "num_eval_images": "of all evaluation datasets together; 0 is all",
    "lr_end": "there of polynomial and cosine only, here of linear, too",
    "vae_batch_size": "changes speed and memory only",
    "base_model_precision": "only the blocks' linear layers; fp8-torchao here quantises no "
    "activations",
    "dynamo_backend": "here always block by block, with dynamic shapes",
    "evaluation_type": "from 0 to 100; by openai/clip-vit-large-patch14 where none is named",
    "pretrained_evaluation_model_name_or_path": "only safetensors are read; "
    "openai/clip-vit-large-patch14 has them",
    "validation_preview": "there not for OmniGen; here also without a webhook, into files",
    "push_checkpoints_to_hub": "each replaces the one before in a commit of its own",
    "model_card_note": "at the top of the model card",
}

#: Taken over, but not the same here.
CHANGES = {
    "caption_dropout_probability": "there a dropped prompt is empty; here it is `<cfg>`, as "
    "OmniGen was trained (caption_dropout_prompt)",
    "masked_loss_probability": "there masks were ignored for OmniGen; here it is drawn for each "
    "sample whether its mask weights its loss",
    "maximum_image_size": "there only a switch for target_downsample_size; here a limit: larger "
    "images are shrunk to target_downsample_size, or left out without it",
}

IGNORED_MASKS = (
    "there masks were ignored for OmniGen; here they weight the loss, and images without one are "
    "rejected"
)

#: Optimizers that have another name here.
OPTIMIZERS = {
    "torch-adamw": "adamw",
    "optimi-adamw": "adamw",
    "optimi-stableadamw": "adamw",
    "optimi-lion": "lion",
    "adamw_schedulefree+aggressive": "adamw_schedulefree",
    "adamw_schedulefree+no_kahan": "adamw_schedulefree",
    "ao-adamw8bit": "bnb-adamw8bit",
}

_MOMENTS = "there with betas 0.9 and 0.99 and epsilon 1e-6; here adam_beta1, adam_beta2 and "
#: Values that mean something else here, or that need a remark: key and value there.
VALUES: dict[tuple[str, str], tuple[Outcome, str]] = {
    ("optimizer", "adamw_bf16"): (
        "taken over",
        "here the same as `adamw`: adapter weights are float32 anyway",
    ),
    ("optimizer", "optimi-adamw"): ("changed", f"{_MOMENTS}adam_epsilon hold"),
    ("optimizer", "optimi-stableadamw"): (
        "changed",
        f"{_MOMENTS}adam_epsilon hold, and updates are not clipped one by one",
    ),
    ("optimizer", "adamw_schedulefree+aggressive"): (
        "changed",
        "there with other decay and epsilon; here adam_weight_decay and adam_epsilon hold",
    ),
    ("optimizer", "ao-adamw8bit"): ("changed", "there from torchao, here from bitsandbytes"),
    ("optimizer", "prodigy"): (
        "changed",
        "there a schedule-free variant (prodigyplus), here the original; learning_rate should be 1",
    ),
    ("lr_scheduler", "cosine"): (
        "changed",
        "there lr_warmup_steps was the length of a wave; here it is a warm-up, after which the "
        "rate falls once, until the run ends",
    ),
    ("lr_scheduler", "cosine_with_restarts"): (
        "changed",
        "there it followed neither lr_num_cycles nor max_train_steps; here the rate falls "
        "lr_num_cycles times, the last time until the run ends",
    ),
}

_CACHE = "latents are found by content here, in the workspace's latents/"
NOT_NEEDED = {
    "model_type": "always an adapter",
    "lora_type": "always LyCORIS",
    "model_family": "always OmniGen",
    "output_dir": "checkpoints and logs lie in the workspace's runs/NAME",
    "logging_dir": "logs lie in the workspace's runs/NAME",
    "cache_dir": "prompts and latents lie in the workspace; the hub's cache is set by HF_HOME",
    "cache_dir_text": "there is no text encoder; token ids lie in manifests/prompts/",
    "cache_dir_vae": _CACHE,
    "vae_cache_ondemand": "`encode-vae` encodes before training, and only what is missing",
    "vae_cache_scan_behaviour": _CACHE,
    "vae_cache_preload": _CACHE,
    "vae_cache_clear_each_epoch": _CACHE,
    "preserve_data_backend_cache": _CACHE,
    "compress_disk_cache": "latents are stored in float16",
    "skip_file_discovery": "unchanged files are not opened again",
    "metadata_backend": "`discover` reads the folder itself",
    "metadata_update_interval": "`discover` publishes every 30 seconds",
    "scan_for_errors": "`discover` lists every file that cannot be used",
    "hash_filenames": "images are known by their content, not by their name",
    "ignore_missing_files": "latents that are missing are named before training",
    "delete_problematic_images": "nothing of yours is ever deleted; they are listed",
    "delete_unwanted_images": "nothing of yours is ever deleted; they are listed",
    "disable_benchmark": "the pictures before the first step are the base model's",
    "write_batch_size": "shards close by size and time",
    "image_processing_batch_size": "headers are read first; decoding has its own threads",
    "dataloader_prefetch": "batches are read ahead, from shards that stay open",
    "dataloader_prefetch_qlen": "batches are read ahead, from shards that stay open",
    "text_encoder_batch_size": "there is no text encoder",
    "offload_during_startup": "VAE and transformer are never in memory together",
    "allow_tf32": "latents do not depend on it: the VAE runs without",
    "i_know_what_i_am_doing": "there is nothing to unlock",
    "ema_*": "the average lies on the GPU, in float32, and takes in every step",
    "attention_mechanism": "PyTorch chooses; no mask is built",
    "dynamo_dynamic": "shapes are always dynamic here",
    "dynamo_use_regional_compilation": "always block by block here",
    "num_workers": "see decode_workers",
    "max_workers": "see decode_workers",
}

WITHOUT_EFFECT = {
    "flow_schedule_shift": "OmniGen's schedule is fixed",
    "flow_schedule_auto_shift": "OmniGen's schedule is fixed",
    "flux_schedule_shift": "OmniGen's schedule is fixed",
    "flux_schedule_auto_shift": "OmniGen's schedule is fixed",
    "lora_rank": "the rank of a LoKr is linear_dim in lycoris_config.json",
    "lora_alpha": "the alpha of a LoKr is linear_alpha in lycoris_config.json",
    "lora_dropout": "not used by LyCORIS",
}

#: What cannot be done here yet, by the whole key or, with `*`, by its beginning.
NOT_SUPPORTED = {
    "validation_*": "no such choice of validation pictures here",
    "num_validation_images": "each validation prompt is drawn once at each size",
    "eval_*": "evaluation is on every dataset with dataset_type eval, at fixed times",
    "base_model_default_dtype": "see mixed_precision",
    "quantize_activations": "only weights are quantised here: with activations, gradients of the "
    "adapter become wrong",
    "quantization_config": "base_model_precision is the only choice here",
    "dynamo_fullgraph": "the core of attention stays outside of the graphs here",
    "webhook_reporting_*": "see step_interval of [[webhook]]",
    "push_to_hub_background": "checkpoints are always pushed beside the training here",
    "publishing_config": "only the hub is published to here",
    "model_card_safe_for_work": "write what others should know into model_card_note",
    "scheduled_sampling_*": "rollout here takes plain Euler steps from a drawn time",
    "vae_cache_disable": "latents always go through shards here",
    "max_upscale_threshold": "`upscale` enlarges all small images or none",
    "deepspeed_config": "no DeepSpeed here",
    "fsdp_*": "only the frozen base model is sharded, block by block",
    "gradient_precision": "gradients of the adapter are float32",
    "snr_gamma": "the loss is OmniGen's own",
    "loss_type": "the loss is OmniGen's own",
    "optimizer_config": "write its options as adam_weight_decay, adam_epsilon and so on",
    "prodigy_steps": "Prodigy adjusts its rate over the whole run here",
    "ignore_final_epochs": "max_train_steps ends the training",
    "caption_filter_list": "captions are taken as they are",
    "probability": "samples are drawn by `repeats` only",
    "start_epoch": "every dataset takes part from the start",
    "start_step": "every dataset takes part from the start",
    "conditioning_*": "no conditioning data here yet but masks (conditioning_type mask)",
    "fallback_caption_column": "a missing caption is listed as such",
    "width_column": "sizes are read from the images",
    "height_column": "sizes are read from the images",
    "identifier_includes_extension": "paths in the table must be whole",
    "train_text_encoder": "there is no text encoder",
    "controlnet*": "no ControlNet here",
    "dropout": "not offered: it does nothing in LoKr as it is used here",
    "rank_dropout": "not offered: it does nothing in LoKr as it is used here",
    "module_dropout": "not there yet",
    "use_tucker": "for convolutions, of which OmniGen's transformer has none to adapt",
    "unet_target_module": "use target_module",
    "target_name": "modules are chosen by class here",
    "name_algo_map": "modules are chosen by class here",
}


def matching(table: dict[str, str], name: str) -> str | None:
    """The note of `table` for `name`: of the key itself, else of a beginning with `*`."""
    if name in table:
        return table[name]
    for pattern, note in table.items():
        if pattern.endswith("*") and name.startswith(pattern[:-1]):
            return note
    return None
