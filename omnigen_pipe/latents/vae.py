"""The VAE: its key, which needs no torch, and its loading, which does.

The key names everything that changes latents beyond rounding: configuration, weights,
precision, tiling. It leaves out what does not: batch size, slicing, device. Only VAEs of
SDXL's shape are taken, because OmniGen knows no other latents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import UsageError
from manifests.keys import key
from omnigen_pipe.config import VaeConfig
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.weights import WEIGHTS_NAME, weights_files, weights_hashes
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    import torch

#: Raised whenever the same pixels and VAE would give other latents.
ENCODE_VERSION = 1

LATENT_CHANNELS = 4
#: Pixels a side per latent.
DOWNSCALE = 8


def vae_key(workspace: Workspace, folder: Path) -> str:
    """The key of the VAE in `folder` as `workspace` would run it; see `vae_inputs`."""
    return inputs_key(vae_inputs(workspace, folder))


def inputs_key(inputs: Mapping[str, str]) -> str:
    """The key of what `vae_inputs` names."""
    return key(*inputs.values())


def vae_inputs(workspace: Workspace, folder: Path, remember: bool = True) -> dict[str, str]:
    """What the key of the VAE in `folder` is made of, as `workspace` would run it, by name.

    Imports no torch. Weights are hashed once and remembered in `manifests/weights.json` by path,
    size and modification time; with `remember` false they are not written down. Raises
    `UsageError` for a VAE or settings that cannot be used.
    """
    options = workspace.config.vae
    semantic = {name: v for name, v in vae_config(folder).items() if not name.startswith("_")}
    hashes = weights_hashes(workspace, weights_files(folder), remember)
    return {
        "version of the encoding": str(ENCODE_VERSION),
        "configuration of the VAE": json.dumps(semantic, sort_keys=True),
        **{f"weights of the VAE ({n})": digest for n, digest in enumerate(hashes, start=1)},
        "vae_dtype": options.vae_dtype,
        "tiling": f"tiles of {options.vae_tile_size}" if options.vae_enable_tiling else "no tiles",
        "latent_dtype": options.latent_dtype,
    }


def vae_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of the VAE in `folder`; raises `UsageError` where OmniGen has no use
    for it: another class, other than 4 latent channels, other than 8 pixels per latent."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no {path}. The VAE must be a folder in diffusers' layout, with config.json "
            f"and {WEIGHTS_NAME}."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}. Fetch the model again.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a JSON object. Fetch the model again.")
    kind = config.get("_class_name", "AutoencoderKL")
    channels = config.get("latent_channels", LATENT_CHANNELS)
    blocks = config.get("block_out_channels", [64])
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else "?"
    if (kind, channels, scale) != ("AutoencoderKL", LATENT_CHANNELS, DOWNSCALE):
        raise UsageError(
            f"{path} describes {kind} with {channels} latent channels at 1/{scale} of the size, "
            f"but OmniGen needs AutoencoderKL with {LATENT_CHANNELS} at 1/{DOWNSCALE}, such as "
            "SDXL's. Name another in pretrained_vae_model_name_or_path."
        )
    return config


def scaling_factor(folder: Path) -> float:
    """The factor between the VAE's latents, as stored in shards, and those the model sees."""
    # 0.18215 is AutoencoderKL's own default where the configuration has none.
    return float(vae_config(folder).get("scaling_factor", 0.18215))


def load_vae(folder: Path, options: VaeConfig, device: torch.device) -> Any:
    """diffusers' AutoencoderKL from `folder`, frozen, on `device`, set up as `options` say.

    Raises `UsageError` where the weights cannot be read, are not all there, or do not fit the
    configuration.
    """
    import torch

    with quiet_imports():
        from diffusers import AutoencoderKL

    vae_config(folder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.vae_dtype]
    vae = _frozen(AutoencoderKL, folder, dtype, "pretrained_vae_model_name_or_path").to(device)
    if options.vae_enable_tiling:
        enable_tiling(vae, options.vae_tile_size)
    if options.vae_enable_slicing:
        vae.enable_slicing()
    return vae


def load_tiny(folder: Path) -> Any:
    """diffusers' AutoencoderTiny from `folder`, frozen, in float32 on the CPU: it decodes the
    latents of SDXL, and takes them scaled.

    Raises `UsageError` where it is none, or of another shape.
    """
    import torch

    with quiet_imports():
        from diffusers import AutoencoderTiny

    _check_tiny(folder)
    return _frozen(AutoencoderTiny, folder, torch.float32, "validation_preview_model")


def _check_tiny(folder: Path) -> None:
    """Raise `UsageError` where `folder` does not hold an AutoencoderTiny of SDXL's shape."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, channels = config["_class_name"], config.get("latent_channels", LATENT_CHANNELS)
        blocks = config.get("num_decoder_blocks", [3, 3, 3, 1])
        scale = config.get("upsampling_scaling_factor", 2) ** (len(blocks) - 1)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read as that of an AutoencoderTiny ({error}). Name another in "
            "validation_preview_model, or set validation_preview = false."
        ) from error
    if (kind, channels, scale) != ("AutoencoderTiny", LATENT_CHANNELS, DOWNSCALE):
        raise UsageError(
            f"{path} describes {kind} with {channels} latent channels at 1/{scale} of the size, "
            f"but previews need AutoencoderTiny with {LATENT_CHANNELS} at 1/{DOWNSCALE}, such as "
            "madebyollin/taesdxl. Name another in validation_preview_model."
        )


def _frozen(kind: Any, folder: Path, dtype: torch.dtype, option: str) -> Any:
    """The autoencoder of diffusers' class `kind` in `folder`, which `option` names, frozen.

    Raises `UsageError` where the weights cannot be read, are not all there, or do not fit.
    """
    from safetensors import SafetensorError

    try:
        found, loaded = kind.from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    # What diffusers raises for damaged weights and wrong configurations; there is no common base.
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise _unusable(folder, " ".join(str(error).split()), option) from error
    # diffusers only warns of what is missing, and leaves it without values.
    missing = set(loaded["missing_keys"])
    missing |= {name for name, parameter in found.named_parameters() if parameter.is_meta}
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise _unusable(folder, f"{len(missing)} tensors are missing, such as {names}", option)
    return found.eval().requires_grad_(False)


def enable_tiling(vae: Any, side: int) -> None:
    """Let `vae` encode and decode in tiles of `side` pixels, with less memory."""
    vae.enable_tiling()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // DOWNSCALE


def _unusable(folder: Path, why: str, option: str) -> UsageError:
    return UsageError(
        f"The VAE in {folder} cannot be loaded: {why.rstrip('.')}. Fetch the model again, or name "
        f"another in {option}."
    )
