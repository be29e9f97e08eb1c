"""Where the parts of the model lie: a folder in diffusers' layout, or a download from the hub.

Imports no torch: the VAE's and the tokenizer's keys are needed before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe import hub
from omnigen_pipe.workspace import Workspace

#: Weights are read from safetensors only; nothing is ever unpickled.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")


def model_part(workspace: Workspace, part: str) -> Path:
    """The folder of one part of the configured model: transformer, vae, tokenizer, scheduler.

    Downloads from the hub what is not in its cache (huggingface_hub's HF_ENDPOINT, HF_HOME and
    login are respected). Raises `UsageError` where the folder or repository is not usable.
    """
    found = _model_part(workspace, part, download=True)
    assert found is not None  # only without a download
    return found


def local_model_part(workspace: Workspace, part: str) -> Path | None:
    """The same without a download: None where it would have to be fetched first."""
    return _model_part(workspace, part, download=False)


def _model_part(workspace: Workspace, part: str, download: bool) -> Path | None:
    model = workspace.config.model
    if part == "vae" and model.pretrained_vae_model_name_or_path is not None:
        vae = _resolve(workspace, model.pretrained_vae_model_name_or_path, None, None, download)
        return vae / "vae" if vae is not None and (vae / "vae").is_dir() else vae
    name = model.pretrained_model_name_or_path
    folder = _resolve(workspace, name, model.revision, part, download)
    if folder is not None and not (folder / part).is_dir():
        if not download and not workspace.path(name).is_dir():
            return None  # the cache holds other parts only
        raise UsageError(
            f"{name} has no folder `{part}/`. pretrained_model_name_or_path must name an OmniGen "
            "in diffusers' layout, with transformer/, vae/, tokenizer/ and scheduler/."
        )
    return folder / part if folder is not None else None


def _resolve(
    workspace: Workspace, name: str, revision: str | None, part: str | None, download: bool
) -> Path | None:
    """The local folder of `name`, downloaded (only `part`, if given) where it is a hub id."""
    local = workspace.path(name)
    if local.is_dir():
        return local
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UsageError(f"The model folder {local} does not exist.")
    patterns = [f"{part}/{p}" if part else p for p in _PATTERNS]
    if part is None:
        patterns += [f"vae/{p}" for p in _PATTERNS]
    if not download:
        return hub.cached(name, "model", revision, patterns)
    what = f"`{name}` is not a folder ({local}), and the model of that name"
    return hub.fetch(name, "model", revision, patterns, what=what)
