"""Drawing: diffusers' `OmniGenPipeline` around a transformer that is already loaded.

The loop over times, guidance and the scheduler are diffusers' own. Replaced is what tokenises
and lays out the prompts: by the tokenizer, positions and spans that training uses, and with a
negative prompt of one's choice. Besides, velocities are float32 before guidance and the step,
so that latents are not rounded to bfloat16 between steps, and the VAE decodes outside of
autocast, in float32 without TF32, one picture at a time.

Given up: saving the second pass where guidance is 1, and input images.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from manifests.errors import PipeError, UsageError
from omnigen_pipe.device import exact_float32
from omnigen_pipe.latents.vae import enable_tiling
from omnigen_pipe.model.transformer import assembled
from omnigen_pipe.model_files import PIXELS_PER_LATENT
from omnigen_pipe.prompts.tokenizer import PromptTokenizer
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.sampling.requests import Request, Settings

#: Side in pixels of the tiles in which a picture is decoded that does not fit into memory as one.
_TILE = 512


def load_scheduler(folder: Path) -> Any:
    """diffusers' `FlowMatchEulerDiscreteScheduler` of the folder `scheduler/`.

    Raises `UsageError` where it is not OmniGen's, in whose times 0 is noise and 1 is clean.
    """
    with quiet_imports():
        from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"The scheduler in {folder} cannot be loaded: {why}") from error
    if not scheduler.config.invert_sigmas or scheduler.config.num_train_timesteps != 1:
        raise UsageError(
            f"The scheduler in {folder} is not OmniGen's: invert_sigmas must be true and "
            "num_train_timesteps 1. Fetch the model again."
        )
    return scheduler


def build_pipeline(
    transformer: Any, vae: Any, scheduler: Any, tokenizer: PromptTokenizer, network: Any = None
) -> Any:
    """diffusers' `OmniGenPipeline` of these parts, for `draw`.

    `transformer` is `load_transformer`'s, with or without an adapter; `vae` is in float32, because
    SDXL's overflows in float16, and bfloat16's 8 bits are no more than a picture's own. Both are
    on the device that is to compute; without a VAE (None) only `draw_latents` can be had. `network`
    is LyCORIS' of the adapter at its own strength, for `set_strength`.
    """
    with quiet_imports():
        from diffusers import OmniGenPipeline

    pipe = OmniGenPipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=None)
    pipe.multimodal_processor = PromptProcessor(
        tokenizer, PIXELS_PER_LATENT * transformer.config.patch_size
    )
    pipe.encode_input_images = _no_input_images  # diffusers' own asks the VAE even for none
    pipe.set_progress_bar_config(disable=True)
    pipe._callback_tensor_inputs = ["latents", "noise_pred"]  # all that `draw_latents` asks for
    pipe.adapter = network
    pipe.adapter_multiplier = None if network is None else network.multiplier
    return pipe


def _no_input_images(*_: object, **__: object) -> list[Any]:
    return []


def set_strength(pipe: Any, strength: float) -> None:
    """Let the adapter of `pipe` compute at `strength` times the strength that it was trained at;
    0 is the base model, to the last bit."""
    pipe.adapter.set_multiplier(strength * pipe.adapter_multiplier)


class PromptProcessor:
    """Takes the place of diffusers' `OmniGenMultiModalProcessor`; its call has that signature."""

    #: The pipeline asks for it, for input images.
    max_image_size = 1024

    def __init__(self, tokenizer: PromptTokenizer, pixels_per_token: int) -> None:
        self.tokenizer = tokenizer
        self._pixels_per_token = pixels_per_token
        #: What guidance steers away from.
        self.negative_prompt = ""

    def __call__(
        self,
        prompt: Sequence[str],
        input_images: None = None,
        *,
        height: int,
        width: int,
        num_images_per_prompt: int = 1,
        **_: object,
    ) -> dict[str, Any]:
        """What the transformer takes: the prompts' rows, then the negative prompt's as often."""
        rows = [p for p in prompt for _ in range(num_images_per_prompt)]
        *wanted, unwanted = self.tokenizer.encode([*rows, self.negative_prompt])
        side = self._pixels_per_token
        image_tokens = (height // side) * (width // side)
        everything = [*wanted, *[unwanted] * len(wanted)]
        ids, positions, span = assembled(everything, image_tokens, torch.device("cpu"))
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": span,
            "input_pixel_values": [],
            "input_image_sizes": {},
        }


def largest_token(tokenizer: PromptTokenizer, prompts: Sequence[str]) -> int:
    """The largest token id in `prompts`, to hold against the transformer's vocabulary."""
    return max(max(ids) for ids in tokenizer.encode(prompts))


def draw(
    pipe: Any,
    requests: Sequence[Request],
    settings: Settings,
    autocast: AbstractContextManager[Any],
    on_step: Callable[[], object] = lambda: None,
    say: Callable[[str], object] = lambda sentence: None,
) -> list[Image.Image | None]:
    """The pictures of `requests`, RGB, drawn as one batch by `build_pipeline`'s `pipe`.

    None takes the place of a picture that came out as something else than numbers. `autocast` is
    the precision of the transformer's passes, and `on_step` is called after each step. A picture's
    noise comes from a CPU generator of its own seed, as diffusers would draw it. Where memory is
    too short to decode one as a whole, it and all later ones are decoded in tiles, which `say`
    tells. Raises `PipeError` where the device has too little memory for that, too.
    """
    try:
        latents = draw_latents(pipe, requests, settings, autocast, on_step)
        return [decoded(pipe.vae, latent, say) for latent in latents]
    except torch.OutOfMemoryError as error:
        many = len(requests) > 1
        what = f"{len(requests)} pictures at once" if many else "one picture"
        raise PipeError(
            f"{pipe.device} ran out of memory at {what}, {settings.size} pixels. "
            f"{'Lower the batch size' if many else 'Choose a smaller size'}, or free memory that "
            "other programs use."
        ) from error


def draw_latents(
    pipe: Any,
    requests: Sequence[Request],
    settings: Settings,
    autocast: AbstractContextManager[Any],
    on_step: Callable[[], object] = lambda: None,
    on_estimate: Callable[[int, torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """What `draw` decodes: scaled clean latents `[B, 4, H/8, W/8]`, float32.

    `on_estimate` is told, after each step, how many are done and what this would be by the velocity
    of that step (`clean_estimate`); it must not change it.
    """

    def step_ended(_: object, index: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        if on_estimate is not None:
            after = pipe.scheduler.sigmas[index + 1]  # inverted: it is the time
            velocity = tensors["noise_pred"]  # guided
            on_estimate(index + 1, clean_estimate(tensors["latents"], velocity, after))
        return {}

    pipe.multimodal_processor.negative_prompt = settings.negative_prompt
    with autocast, _float32_velocity(pipe.transformer):
        latents: torch.Tensor = pipe(
            [request.prompt for request in requests],
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_ended,
            callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
        )[0]
    return latents


def clean_estimate(
    noisy: torch.Tensor, velocity: torch.Tensor, time: torch.Tensor | float
) -> torch.Tensor:
    """The clean latent to which `noisy`, at `time` (0 is noise, 1 is clean), would come by keeping
    to `velocity`: x_t + (1 - t) v, which for x_t = t x1 + (1 - t) x0 and v = x1 - x0 is x1.

    An Euler step with that velocity changes nothing of it.
    """
    return noisy + (1 - time) * velocity


@contextmanager
def _float32_velocity(transformer: Any) -> Iterator[None]:
    """Within it the transformer's velocities are float32.

    diffusers' scheduler returns latents in the dtype of the velocity: in bfloat16 they would be
    rounded at every step.
    """

    def widened(module: Any, inputs: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (output[0].float(),)

    handle = transformer.register_forward_hook(widened)
    try:
        yield
    finally:
        handle.remove()


def decoded(
    vae: Any, latent: torch.Tensor, say: Callable[[str], object] = lambda sentence: None
) -> Image.Image | None:
    """The picture of one scaled latent `[4, H/8, W/8]`, RGB; None where it is not finite.

    `vae` and `latent` are on the device that computes. Where memory is too short, `vae` decodes in
    tiles from then on, which `say` tells. Raises `torch.OutOfMemoryError` where that does not do.
    """
    pixels = None
    try:
        pixels = _pixels(vae, latent)
    except torch.OutOfMemoryError:
        if vae.use_tiling:
            raise
    if pixels is None:  # not above: there the error still holds on to what was computed
        gc.collect()
        torch.cuda.empty_cache()
        enable_tiling(vae, _TILE)
        say(
            f"{latent.device} has too little memory to decode a picture as a whole: from here on "
            f"pictures are decoded in tiles of {_TILE} px, which changes them slightly."
        )
        pixels = _pixels(vae, latent)
    return _picture(pixels)


def preview(tiny: Any, latent: torch.Tensor) -> Image.Image | None:
    """The picture of one scaled latent `[4, H/8, W/8]` by the AutoencoderTiny `tiny`, RGB; None
    where it is not finite. Both are on one device. Raises `RuntimeError` where torch does."""
    with torch.autocast(latent.device.type, enabled=False):
        return _picture(_pixels(tiny, latent))


def _picture(pixels: torch.Tensor) -> Image.Image | None:
    """The picture of `[1, 3, H, W]` from -1 to 1; None where they are not finite."""
    with quiet_imports():
        from diffusers.image_processor import VaeImageProcessor

    if not bool(pixels.isfinite().all()):
        return None
    picture: Image.Image = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
    return picture


def _pixels(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """`[1, 3, H, W]` from -1 to 1, as `vae` decodes `latent`."""
    with torch.no_grad(), exact_float32():
        unscaled = latent[None].to(vae.dtype) / vae.config.scaling_factor
        pixels: torch.Tensor = vae.decode(unscaled, return_dict=False)[0]
    return pixels
