"""The configuration: one TOML file, `omnigen-pipe.toml`, checked key by key.

Option names are those of the OmniGen quickstart of SimpleTuner wherever it has one. Every
field's description is what `docs/configuration.md` and the commented file of
`omnigen-pipe init` print. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from manifests.errors import UsageError
from omnigen_pipe import precisions
from omnigen_pipe.events import EventName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_NAME = "omnigen-pipe.toml"

#: The name of the model that is shipped with the package. A folder of that name is `./embedded`.
EMBEDDED = "embedded"

#: The `mask` that means the images' own alpha channel.
ALPHA = "alpha"

#: Longest side of a bucket in pixels: 192 position embeddings, 2 latents each, 8 pixels each.
MAX_BUCKET_SIDE = 3072
#: Bucket sides are multiples of this: 8 pixels a latent, 2x2 latents a token.
MIN_ALIGNMENT = 16
#: VAE tiles overlap by a quarter, which must be whole latents: 4 * 8 pixels.
TILE_ALIGNMENT = 32
#: Larger sizes, in whatever unit, are slips of the pen.
MAX_SIZE = 1_000_000
#: A million images seen so often still make an epoch that 64 bits can count.
MAX_REPEATS = 1_000_000
#: Seeds are what torch and TOML both take.
MAX_SEED = 2**63 - 1
#: Of pictures: `generate` counts up from it.
MAX_PICTURE_SEED = 2**62


class _Table(BaseModel):
    # Strict: "3" is no number, and 1 is not true. Whole numbers still pass for decimals, and
    # fields that are tuples say strict=False, because TOML and JSON know only lists.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelConfig(_Table):
    """Which OmniGen: a hub id or a folder in diffusers' layout."""

    pretrained_model_name_or_path: str = Field(
        "Shitao/OmniGen-v1-diffusers",
        description="Hub id, or a folder with `transformer/`, `vae/`, `tokenizer/` and "
        "`scheduler/`. Relative folders start at the workspace. `embedded` is the small model "
        "that comes with this package (a folder of that name is `./embedded`).",
    )
    model_flavour: Literal["v1"] = Field("v1", description="The released flavour of OmniGen.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    pretrained_vae_model_name_or_path: str | None = Field(
        None, description="Another VAE: a hub id or folder with its `config.json` and weights."
    )


_Aspect = Annotated[float, Field(gt=0, le=MAX_SIZE)]


class DatasetOptions(_Table):
    """What may be set for every dataset at once in `[defaults]`, and per `[[dataset]]`."""

    resolution: float = Field(
        1024,
        gt=0,
        le=MAX_SIZE,
        description="Target size of the images, in the unit of `resolution_type`.",
    )
    resolution_type: Literal["pixel", "area", "pixel_area"] = Field(
        "pixel_area",
        description="`pixel`: length of the shorter side. `area`: megapixels. `pixel_area`: "
        "side of the square of the same area, so 1024 means about 1024*1024 pixels.",
    )
    minimum_image_size: float = Field(
        0,
        ge=0,
        le=MAX_SIZE,
        description="Smaller images are left out. Unit of `resolution_type`; 0: none.",
    )
    maximum_image_size: float = Field(
        0,
        ge=0,
        le=MAX_SIZE,
        description="Larger images are left out or, where `target_downsample_size` is set, "
        "shrunk to that first. Unit of `resolution_type`; 0: no limit.",
    )
    target_downsample_size: float = Field(
        0,
        ge=0,
        le=MAX_SIZE,
        description="Size to which a large image is shrunk before it is cropped. Unit of "
        "`resolution_type`; 0: shrink until it just covers its bucket.",
    )
    upscale: bool = Field(
        False, description="Enlarge images smaller than their bucket instead of leaving them out."
    )
    crop: bool = Field(
        False,
        description="Crop to `crop_aspect`. Without it the bucket follows the image's own "
        "aspect, and only the overhang of the alignment is trimmed, centred.",
    )
    crop_aspect: Literal["square", "preserve", "closest"] = Field(
        "square",
        description="`square`; `preserve`: the image's own aspect; `closest`: the nearest of "
        "`crop_aspect_buckets`.",
    )
    crop_aspect_buckets: tuple[_Aspect, ...] = Field(
        (),
        strict=False,
        description='Aspect ratios (width / height) for `crop_aspect = "closest"`.',
    )
    crop_style: Literal["center", "random", "corner"] = Field(
        "center",
        description="Where the crop lies: `center`, `random` (seeded by image and `crop_seed`) "
        "or `corner` (top left).",
    )
    crop_seed: int = Field(0, ge=0, le=MAX_SEED, description='Seed of `crop_style = "random"`.')
    crops_per_image: int = Field(
        1, ge=1, le=64, description='Crops of each image with `crop_style = "random"`.'
    )
    aspect_bucket_alignment: int = Field(
        64,
        gt=0,
        le=MAX_BUCKET_SIDE,
        multiple_of=MIN_ALIGNMENT,
        description="Bucket sides are multiples of this, itself a multiple of 16 (pixels).",
    )
    aspect_bucket_rounding: int = Field(
        2, ge=0, le=6, description="Decimal places to which aspect ratios are rounded."
    )
    repeats: int = Field(
        0,
        ge=0,
        le=MAX_REPEATS,
        description="Extra times per epoch: a sample is seen `repeats` + 1 times.",
    )
    caption_strategy: Literal[
        "filename", "instanceprompt", "textfile", "jsonl", "csv", "parquet"
    ] = Field(
        "filename",
        description="Where captions come from: the file's name, `instance_prompt`, a `.txt` "
        "beside the image, or a column of `list_file`.",
    )
    caption_column: str = Field(
        "caption", description="Column of `list_file` with the caption, or a list of captions."
    )
    path_column: str = Field("path", description="Column of `list_file` with the image's path.")
    instance_prompt: str | None = Field(
        None, description='The caption of every image with `caption_strategy = "instanceprompt"`.'
    )
    prepend_instance_prompt: bool = Field(
        False, description="Put `instance_prompt` and a space before every caption."
    )
    textfile_lines: Literal["captions", "join"] = Field(
        "captions",
        description="`captions`: every line of a `.txt` is a caption of its own, one of which "
        "is drawn each time. `join`: the lines are one caption.",
    )
    animated: Literal["reject", "first"] = Field(
        "reject", description="Animations: `reject`, or use the `first` frame."
    )
    maximum_pixels: int = Field(
        200_000_000,
        gt=0,
        description="Images of more pixels are rejected unopened (decompression bombs).",
    )


def in_unit(size: float, resolution_type: str) -> Fraction:
    """A size as written, exactly: as a side in pixels for `pixel`, else as an area in pixels."""
    exact = Fraction(repr(size))
    if resolution_type == "area":
        return exact * 10**6
    return exact if resolution_type == "pixel" else exact * exact


def nearest_whole(value: Fraction) -> int:
    """The nearest whole number, halves up."""
    return math.floor(value + Fraction(1, 2))


def square_side(options: DatasetOptions) -> int:
    """Side in pixels of the bucket of square images; 0 below half of the alignment."""
    step = options.aspect_bucket_alignment
    target = nearest_whole(in_unit(options.resolution, options.resolution_type))
    if options.resolution_type == "pixel":
        return nearest_whole(Fraction(target, step)) * step
    # k steps are nearest to the root of the area where (2k - 1)**2 <= 4 * area / step**2.
    return (math.isqrt(4 * target // step**2) + 1) // 2 * step


class DatasetConfig(DatasetOptions):
    """A `[[dataset]]`: a source of images and captions, with its options."""

    id: str = Field(
        description="Name of the dataset in manifests and messages.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    instance_data_dir: str = Field(
        min_length=1,
        description="Folder of the images, or `hf://datasets/OWNER/NAME` with an optional "
        "`@REVISION` and `/SUBFOLDER`. Relative folders start at the workspace.",
    )
    type: Literal["local", "list", "huggingface"] | None = Field(
        None,
        description="`local`: walk the folder. `list`: only the images that `list_file` names. "
        "`huggingface`: a dataset repository. Default: by `instance_data_dir`.",
    )
    dataset_type: Literal["image", "eval"] = Field(
        "image", description="`eval`: never trained on, kept for evaluation."
    )
    is_regularisation_data: bool = Field(
        False, description="Train these towards the base model's own prediction."
    )
    disabled: bool = Field(False, description="Leave this dataset out.")
    list_file: str | None = Field(
        None,
        description="JSONL, CSV or Parquet table with paths and captions. Its paths start at "
        "`instance_data_dir` and must stay inside it.",
    )

    mask: str | None = Field(
        None,
        description="Loss masks: a folder of greyscale pictures (white counts, black does not), "
        "each found by its image's path without the extension, or `alpha`, the images' own alpha "
        "channel (a folder of that name is `./alpha`). Relative folders start at the workspace. "
        "Images without a mask are rejected.",
    )

    @property
    def mask_folder(self) -> str | None:
        """The folder of masks as written; None without masks, and where they are alpha channels."""
        return None if self.mask == ALPHA else self.mask

    @property
    def split(self) -> str:
        """`train`, `eval` or `regularisation`."""
        if self.dataset_type == "eval":
            return "eval"
        return "regularisation" if self.is_regularisation_data else "train"

    @property
    def source(self) -> str:
        """`local`, `list` or `huggingface`, with the default filled in."""
        if self.type is not None:
            return self.type
        return "huggingface" if self.instance_data_dir.startswith("hf://") else "local"

    @model_validator(mode="after")
    def _consistent(self) -> DatasetConfig:
        where = f"dataset `{self.id}`"
        aligned = square_side(self)
        if aligned > MAX_BUCKET_SIDE:
            raise ValueError(
                f"{where}: resolution {self.resolution:g} ({self.resolution_type}) makes buckets "
                f"of {aligned} px a side; OmniGen's limit is {MAX_BUCKET_SIDE} px"
            )
        if aligned == 0:
            raise ValueError(
                f"{where}: resolution {self.resolution:g} ({self.resolution_type}) is less than "
                f"half of aspect_bucket_alignment ({self.aspect_bucket_alignment} px)"
            )
        if self.crop and self.crop_aspect == "closest" and not self.crop_aspect_buckets:
            raise ValueError(
                f'{where}: crop_aspect = "closest" needs crop_aspect_buckets, such as '
                "[0.75, 1.0, 1.33]"
            )
        if self.crops_per_image > 1 and not (self.crop and self.crop_style == "random"):
            raise ValueError(
                f"{where}: crops_per_image = {self.crops_per_image} needs crop = true and "
                'crop_style = "random"'
            )
        if self.caption_strategy == "instanceprompt" and not self.instance_prompt:
            raise ValueError(f'{where}: caption_strategy "instanceprompt" needs instance_prompt')
        if self.prepend_instance_prompt and not self.instance_prompt:
            raise ValueError(f"{where}: prepend_instance_prompt needs instance_prompt")
        if self.source == "list" and self.list_file is None:
            raise ValueError(f'{where}: type = "list" needs list_file')
        from_list = self.caption_strategy in ("jsonl", "csv", "parquet")
        if from_list and self.list_file is None:
            raise ValueError(f'{where}: caption_strategy "{self.caption_strategy}" needs list_file')
        if self.list_file is not None and not from_list and self.source != "list":
            raise ValueError(
                f'{where}: list_file has no effect with caption_strategy "{self.caption_strategy}"'
                '. Set caption_strategy to "jsonl", "csv" or "parquet" to take captions from it, '
                'or type = "list" to take only the images that it names'
            )
        if self.source == "huggingface" and not self.instance_data_dir.startswith("hf://datasets/"):
            raise ValueError(
                f"{where}: a huggingface dataset is written hf://datasets/OWNER/NAME, not "
                f"{self.instance_data_dir}"
            )
        if self.dataset_type == "eval" and self.is_regularisation_data:
            raise ValueError(f"{where}: eval data cannot be regularisation data as well")
        if 0 < self.maximum_image_size < self.minimum_image_size:
            raise ValueError(f"{where}: maximum_image_size is below minimum_image_size")
        return self


class PixelsConfig(_Table):
    """How image files become the pixels that the VAE gets."""

    decode: Literal["full", "reduced"] = Field(
        "full",
        description="`reduced`: JPEGs are decoded at the largest reduction that leaves at least "
        "1.5 times the size they are resized to. Faster, and not quite the same pixels.",
    )
    alpha_background: str = Field(
        "white", description="Colour under transparent images: a name or `#rrggbb`."
    )

    @model_validator(mode="after")
    def _known_colour(self) -> PixelsConfig:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(self.alpha_background)
        except ValueError as error:
            raise ValueError(
                f'alpha_background "{self.alpha_background}" is not a colour; use a name such '
                "as white, or #rrggbb"
            ) from error
        return self


class VaeConfig(_Table):
    """How latents are encoded."""

    vae_batch_size: int = Field(4, ge=1, description="Images per VAE batch.")
    vae_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the VAE. OmniGen's authors encode in float32."
    )
    latent_dtype: Literal["fp16", "fp32"] = Field("fp16", description="Precision in the shards.")
    vae_enable_tiling: bool = Field(
        False, description="Encode in tiles: less memory, slightly other latents."
    )
    vae_tile_size: int = Field(512, ge=64, description="Side of a tile in pixels.")
    vae_enable_slicing: bool = Field(
        False, description="Encode the images of a batch one after the other."
    )
    decode_workers: int = Field(
        0,
        ge=0,
        description="Threads that decode images; 0: as many as the cores this process may use.",
    )
    shard_size_mb: int = Field(256, ge=1, description="A shard closes at this size, in MiB…")
    shard_seconds: float = Field(60, gt=0, description="…or at this age, in seconds.")

    @model_validator(mode="after")
    def _tiles_meet(self) -> VaeConfig:
        if self.vae_enable_tiling and self.vae_tile_size % TILE_ALIGNMENT:
            raise ValueError(
                f"vae_tile_size is {self.vae_tile_size}, but must be a multiple of "
                f"{TILE_ALIGNMENT} pixels, or tiles do not meet"
            )
        return self


class PromptsConfig(_Table):
    """How prompts are tokenised."""

    warn_tokens: int = Field(
        512,
        ge=0,
        description="Name prompts of more tokens than this in the summary; 0: never. Nothing is "
        "ever truncated. The default, about a page of text, is a choice and no limit of OmniGen.",
    )


def parsed_sizes(text: str) -> list[tuple[int, int]]:
    """Width and height in pixels of each size in `text`: `1024x1024,1280x768`, and a number alone
    is the side of a square.

    Raises `ValueError` for what is none, or a side that no picture can have.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", part.strip())
        if match is None:
            raise ValueError(
                f"`{part.strip()}` is no size: write WIDTHxHEIGHT in pixels, such as 1024x768, "
                "several with commas between"
            )
        width = int(match[1])
        height = width if match[2] is None else int(match[2])
        nearest = [_nearest_side(side) for side in (width, height)]
        if [width, height] != nearest:
            raise ValueError(
                f"`{part.strip()}`: sides are multiples of {MIN_ALIGNMENT}, at most "
                f"{MAX_BUCKET_SIDE}; the nearest is {nearest[0]}x{nearest[1]}"
            )
        sizes.append((width, height))
    return list(dict.fromkeys(sizes))


def _nearest_side(side: int) -> int:
    multiple = (side + MIN_ALIGNMENT // 2) // MIN_ALIGNMENT * MIN_ALIGNMENT
    return min(max(MIN_ALIGNMENT, multiple), MAX_BUCKET_SIDE)


def _checked_resolutions(text: str | None) -> str | None:
    try:
        if text is not None:
            parsed_sizes(text)
    except ValueError as error:
        raise ValueError(f"validation_resolution: {error}") from error
    return text


class ValidationConfig(_Table):
    """Validation pictures: what training draws now and then (docs/validation.md), and what
    `omnigen-pipe generate` draws where it is given no prompts.

    The prompts are tokenised beside the captions.
    """

    validation_prompt: str | None = Field(
        None, description="The main validation prompt; its pictures are named `validation`."
    )
    user_prompt_library: str | None = Field(
        None, description="JSON file of nickname: prompt. Relative paths start at the workspace."
    )
    validation_negative_prompt: str | None = Field(
        None,
        description="Negative prompt, also that of `omnigen-pipe generate` with this workspace's "
        "model; default: the one built into diffusers' OmniGen.",
    )
    validation_step_interval: int = Field(
        0,
        ge=0,
        description="Optimizer steps between validations, which also come before the first step "
        "and after the last; 0: training draws none.",
    )
    validation_seed: int = Field(
        0,
        ge=0,
        le=MAX_PICTURE_SEED,
        description="Seed of every picture's noise: the same each time.",
    )
    validation_resolution: Annotated[str | None, AfterValidator(_checked_resolutions)] = Field(
        None,
        description="Sizes in pixels, WIDTHxHEIGHT, several with commas: every prompt is drawn at "
        "each. Multiples of 16; default: the model's own size, else 1024x1024.",
    )
    validation_guidance: float | None = Field(
        None,
        ge=0,
        description="Guidance scale; default: the model's own, else 2.5.",
    )
    validation_num_inference_steps: int | None = Field(
        None, ge=1, description="Steps from noise to picture; default: the model's own, else 50."
    )
    validation_preview: bool = Field(
        False,
        description="Show how validation pictures come about: what each will be, as it is "
        "estimated while it is drawn, in files and to webhooks.",
    )
    validation_preview_steps: int = Field(
        1, ge=1, description="Steps of drawing between two previews of a picture."
    )
    validation_preview_model: str = Field(
        "madebyollin/taesdxl",
        description="What decodes previews: the hub id or folder of an `AutoencoderTiny` for "
        "SDXL's latents. Relative folders start at the workspace.",
    )
    validation_preview_revision: str | None = Field(
        None, description="Branch, tag or commit of `validation_preview_model` on the hub."
    )
    evaluation_type: Literal["none", "clip"] = Field(
        "none",
        description="`clip`: score each validation picture by how well CLIP finds that it fits its "
        "prompt. Needs torchmetrics.",
    )
    pretrained_evaluation_model_name_or_path: str = Field(
        "openai/clip-vit-large-patch14",
        description="The CLIP that scores: a hub id or folder with its `config.json`, "
        "`preprocessor_config.json`, `tokenizer.json` and weights in safetensors. Relative "
        "folders start at the workspace.",
    )
    pretrained_evaluation_model_revision: str | None = Field(
        None, description="Branch, tag or commit of that CLIP on the hub."
    )


def _checked_factor(value: int) -> int:
    if value == -1 or value >= 1:
        return value
    raise ValueError(f"a LoKr factor is 1 or more, or -1 for near square, not {value}")


_Factor = Annotated[int, AfterValidator(_checked_factor)]


def _checked_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value


_Pattern = Annotated[str, AfterValidator(_checked_pattern)]


class LokrModuleConfig(_Table):
    """Options for the modules of one class."""

    factor: _Factor | None = Field(None, description="Kronecker factor of these modules.")
    linear_dim: int | None = Field(None, ge=1, description="Rank of these modules.")
    linear_alpha: float | None = Field(None, gt=0, description="Alpha of these modules.")


class LokrPresetConfig(_Table):
    """Which modules of the transformer are adapted."""

    target_module: tuple[str, ...] = Field(
        ("Attention", "FeedForward"),
        min_length=1,
        strict=False,
        description="Classes whose linear layers are adapted. `FeedForward` means OmniGen's "
        "`OmniGenFeedForward`.",
    )
    module_algo_map: dict[str, LokrModuleConfig] = Field(
        default_factory=lambda: {
            "Attention": LokrModuleConfig(factor=16),
            "FeedForward": LokrModuleConfig(factor=8),
        },
        description="Options per class, such as `FeedForward = { factor = 8 }`.",
    )
    exclude_name: tuple[_Pattern, ...] = Field(
        (),
        strict=False,
        description="Regular expressions: a module is left as it is where one matches its whole "
        "name, or that of a module around it. `layers\\.[0-9]` are the first ten blocks.",
    )


class LokrConfig(_Table):
    """The LoKr adapter; the keys are those of `lycoris_config.json`."""

    algo: Literal["lokr"] = Field("lokr", description="Always `lokr`.")
    multiplier: float = Field(1.0, description="Strength of the adapter while training.")
    linear_dim: int = Field(
        10000,
        ge=1,
        description="Rank of the larger factor. At or above half of its side (10000 always is) "
        "it is a full matrix, and linear_alpha has no effect.",
    )
    linear_alpha: float = Field(1, gt=0, description="Scale of a low-rank factor: alpha / rank.")
    factor: _Factor = Field(
        16,
        description="Size of the smaller Kronecker factor; -1: near square. Where it is given "
        "without `module_algo_map`, it is every target's.",
    )
    decompose_both: bool = Field(False, description="Make the smaller factor low-rank too.")
    full_matrix: bool = Field(False, description="Full matrices whatever `linear_dim` says.")
    apply_preset: LokrPresetConfig = Field(
        default_factory=LokrPresetConfig, description="Which modules are adapted."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_factor(cls, raw: Any) -> Any:
        """A factor that is given without a map is meant for every target, not for none."""
        if not isinstance(raw, dict) or "factor" not in raw:
            return raw
        preset = raw.get("apply_preset", {})
        if not isinstance(preset, dict) or "module_algo_map" in preset:
            return raw
        return {**raw, "apply_preset": {**preset, "module_algo_map": {}}}

    def unused_factor(self) -> str | None:
        """A sentence where `factor` is given and every target has another one of its own."""
        preset = self.apply_preset
        own = [preset.module_algo_map.get(target) for target in preset.target_module]
        factors = {options.factor if options is not None else None for options in own}
        if "factor" not in self.model_fields_set or factors & {None, self.factor}:
            return None
        return (
            f"[lokr] factor = {self.factor} has no effect: module_algo_map gives every target one "
            "of its own."
        )


class TrainConfig(_Table):
    """The training loop."""

    tracker_run_name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run: its folder is `runs/NAME`.",
    )
    seed: int = Field(42, ge=0, le=MAX_SEED, description="Seed of order, noise, time and captions.")
    max_train_steps: int = Field(
        0, ge=0, description="Optimizer steps to train; 0: unset, see num_train_epochs."
    )
    num_train_epochs: int = Field(
        0, ge=0, description="Epochs to train; 0: unset. With both set, the earlier end counts."
    )
    train_batch_size: int = Field(1, ge=1, description="Samples per micro-batch.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches per optimizer step and process."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate after warm-up.")
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = Field(
        "constant",
        description="How the rate moves after warm-up: `constant` (`constant_with_warmup` is the "
        "same), or falling from learning_rate to lr_end until the run ends.",
    )
    lr_warmup_steps: int = Field(
        100, ge=0, description="Steps in which the rate rises linearly to learning_rate."
    )
    lr_end: float = Field(
        0.0, ge=0, description="The rate at the end of a falling schedule; not of `constant`."
    )
    lr_power: float = Field(
        1.0, gt=0, description="Exponent of `polynomial`; 1 is the same as `linear`."
    )
    lr_num_cycles: int = Field(1, ge=1, description="Falls of `cosine_with_restarts`.")
    optimizer: Literal[
        "adamw",
        "adamw_bf16",
        "lion",
        "prodigy",
        "adamw_schedulefree",
        "bnb-adamw",
        "bnb-adamw-paged",
        "bnb-adamw8bit",
        "bnb-adamw8bit-paged",
        "bnb-lion",
        "bnb-lion-paged",
        "bnb-lion8bit",
        "bnb-lion8bit-paged",
    ] = Field(
        "adamw",
        description="`adamw_bf16` is the same as `adamw`: adapter weights are float32. `prodigy` "
        "finds its own rate, and learning_rate multiplies it: set 1. `bnb-…` needs bitsandbytes. "
        "`docs/train.md` compares them.",
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="First beta of AdamW, Prodigy and schedule-free AdamW."
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="Second beta of AdamW, Prodigy and schedule-free AdamW."
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="Epsilon of AdamW, Prodigy and schedule-free AdamW."
    )
    adam_weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay, of every optimizer."
    )
    lion_beta1: float = Field(0.9, ge=0, lt=1, description="Lion's first beta.")
    lion_beta2: float = Field(0.99, ge=0, lt=1, description="Lion's second beta.")
    prodigy_d_coef: float = Field(
        1.0, gt=0, description="Factor of the rate that Prodigy finds; 0.5 to 2 are usual."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0: off.")
    grad_clip_method: Literal["norm", "value"] = Field(
        "norm",
        description="`norm`: scale to this global norm. `value`: clamp each element to it.",
    )
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = Field(
        "auto",
        description="`bf16` or `fp16`: base weights and autocast in bfloat16 or float16, the "
        "latter with a gradient scaler. `auto`: bf16 where the GPU has it, else `no`.",
    )
    base_model_precision: Annotated[
        precisions.BasePrecision, BeforeValidator(precisions.spelled)
    ] = Field(
        "no_change",
        description="Quantise the linear layers of the frozen base model's blocks: less memory, "
        "some accuracy lost. See docs/precision.md.",
    )
    quantize_via: Literal["cpu", "accelerator"] = Field(
        "cpu",
        description="Where to quantise. `cpu`: the GPU never holds an unquantised block. "
        "`accelerator`: each block is moved first, which may be faster.",
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, slower."
    )
    dynamo_backend: Literal["no", "inductor"] = Field(
        "no", description="`inductor`: compile the blocks with torch.compile at the first step."
    )
    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = Field(
        "default",
        description="Mode of torch.compile. Those with CUDA graphs are not offered: they record "
        "fixed shapes, and buckets and prompts differ.",
    )
    caption_dropout_probability: float = Field(
        0.01, ge=0, le=1, description="Share of draws in which the prompt is dropped."
    )
    caption_dropout_prompt: Literal["<cfg>", "empty", "negative"] = Field(
        "<cfg>",
        description="What a dropped prompt becomes; OmniGen was trained with `<cfg>`.",
    )
    masked_loss_probability: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of draws in which a sample's loss mask, where it has one (`mask` of its "
        "dataset), weights its loss; in the others the whole image counts.",
    )
    vae_posterior: Literal["fresh", "sample", "mean"] = Field(
        "fresh",
        description="`fresh`: a new draw of the VAE's posterior each time, as OmniGen was trained. "
        "`sample`: one draw per sample, kept for the whole run. `mean`: the posterior's mean.",
    )
    scheduled_sampling_max_step_offset: int = Field(
        0,
        ge=0,
        le=50,
        description="Rollout: at most so many of the model's own Euler steps make the noisy "
        "latent of a sample; 0: off.",
    )
    scheduled_sampling_probability: float = Field(
        0.0, ge=0, le=1, description="Share of samples that are rolled out."
    )
    scheduled_sampling_start_step: int = Field(
        0, ge=0, description="Optimizer steps before the first rollout."
    )
    scheduled_sampling_ramp_steps: int = Field(
        0,
        ge=0,
        description="Steps in which the share rises linearly to "
        "`scheduled_sampling_probability`; 0: at once.",
    )
    use_ema: bool = Field(
        False,
        description="Keep an exponential moving average of the adapter, in float32, evaluated "
        "and saved beside it.",
    )
    ema_decay: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="Decay of the average per optimizer step; it starts lower: after n steps "
        "(1 + n) / (10 + n).",
    )
    eval_steps_interval: int = Field(
        0,
        ge=0,
        description='Steps between evaluations on the datasets with `dataset_type = "eval"`, '
        "which also come before the first step and after the last; 0: none.",
    )
    num_eval_images: int = Field(
        0, ge=0, description="Evaluate on this many samples, the first by sample_id; 0: all."
    )
    eval_seed: int = Field(
        0,
        ge=0,
        le=MAX_SEED,
        description="Seed of the evaluation's noise: the same in runs that are to be compared.",
    )
    checkpoint_step_interval: int = Field(
        500, ge=0, description="Steps between checkpoints; 0: only at the end."
    )
    checkpoints_total_limit: int = Field(
        0, ge=0, description="Keep this many newest checkpoints; 0: all."
    )
    resume_from_checkpoint: str = Field(
        "latest",
        description="`latest`, the name of a checkpoint of this run, or `none` to refuse to "
        "go on with an existing run.",
    )
    init_lora: str | None = Field(
        None,
        description="An adapter to start from: its file, a checkpoint's folder, or a run's. It "
        "must have the configured shape. Relative paths start at the workspace.",
    )
    fsdp_enable: bool = Field(
        False,
        description="With several processes: shard the frozen base model over them (FSDP2), for "
        "cards that cannot hold it.",
    )
    report_to: Literal["tensorboard", "wandb", "all", "none"] = Field(
        "tensorboard",
        description="Trackers: where metrics and validation pictures go beside the run's own "
        "files. `wandb` needs the package of that name; `all` is both.",
    )
    tracker_project_name: str = Field(
        "omnigen-pipe", min_length=1, description="Project that `wandb` files the run under."
    )
    lycoris_config: str | None = Field(
        None,
        description="A `lycoris_config.json` to read the adapter from, instead of `[lokr]`.",
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        falling = not self.lr_scheduler.startswith("constant")
        if falling and self.lr_end > self.learning_rate:
            raise ValueError(
                f"lr_end is {self.lr_end}, above learning_rate ({self.learning_rate}), and "
                f"{self.lr_scheduler} falls from learning_rate to lr_end"
            )
        if self.optimizer == "adamw_schedulefree":
            if falling:
                raise ValueError(
                    f"adamw_schedulefree takes the place of a schedule, and lr_scheduler is "
                    f'{self.lr_scheduler}; set lr_scheduler = "constant", or another optimizer'
                )
            if self.adam_beta1 == 0:
                raise ValueError(
                    "adam_beta1 is 0, but adamw_schedulefree divides by it; use a value above 0"
                )
            if self.use_ema:
                raise ValueError(
                    "adamw_schedulefree averages the weights itself; set use_ema = false, or "
                    "another optimizer"
                )
        return self

    @model_validator(mode="after")
    def _whole_rollout(self) -> TrainConfig:
        offset, share = self.scheduled_sampling_max_step_offset, self.scheduled_sampling_probability
        if (offset > 0) != (share > 0):
            raise ValueError(
                f"scheduled_sampling_max_step_offset = {offset} and scheduled_sampling_probability "
                f"= {share:g}: a rollout needs both above 0, and none needs both at 0"
            )
        return self

    @model_validator(mode="after")
    def _compilable(self) -> TrainConfig:
        if self.dynamo_backend != "no" and self.base_model_precision == "int4-quanto":
            raise ValueError(
                f'dynamo_backend "{self.dynamo_backend}" does not go with base_model_precision '
                '"int4-quanto": torch.compile cannot trace its weights. Set dynamo_backend to '
                '"no", or take nf4-bnb'
            )
        if self.fsdp_enable and self.base_model_precision != "no_change":
            raise ValueError(
                f'fsdp_enable does not go with base_model_precision "{self.base_model_precision}": '
                "quantised weights are not sharded. One of the two saves enough memory"
            )
        return self


class HubConfig(_Table):
    """What a run pushes to the hub; see docs/hub.md."""

    push_to_hub: bool = Field(
        False,
        description="When the run is complete, push the adapter, its configuration, validation "
        "pictures and a model card. The login is checked before training.",
    )
    push_checkpoints_to_hub: bool = Field(
        False, description="Push every checkpoint, too, while training goes on."
    )
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The repository: OWNER/NAME, or NAME in the account of the login. It is made "
        "where it is not there.",
    )
    model_card_private: bool = Field(
        False,
        description="Make the repository private. One that is there already stays what it is.",
    )
    model_card_license: str = Field(
        "mit",
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
        description="Licence in the model card, as the hub writes it; OmniGen-v1's own is `mit`.",
    )
    model_card_note: str | None = Field(
        None, description="A paragraph of yours at the top of the model card."
    )
    model_card_trigger_words: tuple[str, ...] | None = Field(
        None,
        strict=False,
        description="Trigger words in the model card; default: every `instance_prompt` that "
        "captions are made with.",
    )

    @model_validator(mode="after")
    def _named(self) -> HubConfig:
        if self.push_checkpoints_to_hub and not self.push_to_hub:
            raise ValueError("[hub] push_checkpoints_to_hub needs push_to_hub = true")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError(
                "[hub] push_to_hub needs hub_model_id, the repository to push to: OWNER/NAME"
            )
        return self


class WebhookConfig(_Table):
    """A `[[webhook]]`: an address that is told how training goes; see docs/webhooks.md."""

    url: SecretStr | None = Field(
        None,
        description="The address, http or https. Whoever knows it can write there: better name "
        "an environment variable with `url_env`.",
    )
    url_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The environment variable that holds the address.",
    )
    form: Literal["json", "discord"] = Field(
        "json", description="`json`: an object with all there is. `discord`: a message for people."
    )
    events: tuple[EventName, ...] = Field(
        ("start", "evaluation", "checkpoint", "preview", "validation", "end", "error"),
        strict=False,
        description="What it is told: start, step, evaluation, checkpoint, preview, validation, "
        "end, error.",
    )
    step_interval: int = Field(100, ge=1, description="Of `step`, only every so many.")

    @model_validator(mode="after")
    def _one_address(self) -> WebhookConfig:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("a [[webhook]] needs either url or url_env, and not both")
        return self


class Config(_Table):
    """The whole file."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    defaults: DatasetOptions = Field(
        default_factory=DatasetOptions,
        description="Options for every dataset that does not set its own.",
    )
    dataset: tuple[DatasetConfig, ...] = Field(default=(), strict=False)
    pixels: PixelsConfig = Field(default_factory=PixelsConfig)
    vae: VaeConfig = Field(default_factory=VaeConfig)
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    lokr: LokrConfig = Field(default_factory=LokrConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    hub: HubConfig = Field(default_factory=HubConfig)
    webhook: tuple[WebhookConfig, ...] = Field(default=(), strict=False)

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """The datasets that are not disabled, in the file's order."""
        return tuple(dataset for dataset in self.dataset if not dataset.disabled)

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("defaults", {}), dict):
            return raw
        defaults = raw.get("defaults", {})
        datasets = raw.get("dataset", ())
        if not isinstance(datasets, (list, tuple)):
            return raw
        merged = [{**defaults, **d} if isinstance(d, dict) else d for d in datasets]
        return {**raw, "dataset": merged}

    @model_validator(mode="after")
    def _distinct_ids(self) -> Config:
        ids = [dataset.id for dataset in self.dataset]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise ValueError(f"two datasets have the id `{repeated[0]}`; ids must differ")
        return self


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _fields_at(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The known keys of the table at `location` below `root`; empty where there is none."""
    current: Any = root
    for step in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(step))
            current = field.annotation if field else None
        elif get_origin(current) in (tuple, dict):
            # A table of tables or an array of tables: all elements are of one kind.
            current = [a for a in get_args(current) if a is not Ellipsis][-1]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def describe(
    error: ValidationError, source: Path | str, root: type[BaseModel] | None = None
) -> str:
    """One line per fault of a configuration: file, key, what is wrong, what is allowed.

    `root` is the model that was validated; `Config` by default.
    """
    faults = error.errors()
    # Datasets inherit the faults of [defaults]: those are named once, where they are written.
    inherited = {
        (fault["loc"][1:], fault["type"], repr(fault["input"]))
        for fault in faults
        if fault["loc"][0:1] == ("defaults",)
    }
    lines = []
    for fault in faults:
        location = fault["loc"]
        same = (location[2:], fault["type"], repr(fault["input"]))
        if location[0:1] == ("dataset",) and same in inherited:
            continue
        place = ".".join(
            f"[{step}]" if isinstance(step, int) else str(step) for step in location
        ).replace(".[", "[")
        if fault["type"] == "extra_forbidden":
            hint = _nearest(str(location[-1]), _fields_at(root or Config, location[:-1]))
            lines.append(f"{source}: unknown key `{place}`{hint}")
        elif location in (("dataset",), ("webhook",)):
            kind = location[0]
            lines.append(
                f"{source}: {kind}s are a list: write [[{kind}]], with two brackets, above the "
                "keys of each"
            )
        elif fault["type"] == "missing":
            lines.append(f"{source}: `{place}` is missing")
        elif fault["type"] == "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{source}: {message}")
        elif location[0:1] == ("webhook",):  # an address is a secret
            lines.append(f"{source}: `{place}`: {fault['msg'].lower()}")
        else:
            lines.append(f"{source}: `{place}` is {fault['input']!r}: {fault['msg'].lower()}")
    return "\n".join(lines)


def parse(raw: dict[str, Any], source: Path | str) -> Config:
    """The configuration in `raw`; raises `UsageError` naming `source` and each fault."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UsageError(describe(error, source)) from error


def load(path: Path) -> Config:
    """The configuration in the TOML file `path`; raises `UsageError` for any fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no {path.name} in {path.parent}. Make one with `omnigen-pipe init`, or "
            "name the workspace with --workspace."
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    return parse(raw, path)


def read_lycoris_config(path: Path) -> LokrConfig:
    """The adapter in a `lycoris_config.json`; raises `UsageError` for any fault in it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"lycoris_config names {path}, which does not exist.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    try:
        return LokrConfig.model_validate(raw)
    except ValidationError as error:
        raise UsageError(describe(error, path, LokrConfig)) from error
