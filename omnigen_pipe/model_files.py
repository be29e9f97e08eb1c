"""Where the parts of the model lie: a folder in diffusers' layout, a download from the hub, or the
package itself.

Imports no torch: the VAE's and the tokenizer's keys are needed before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe import hub
from omnigen_pipe.config import EMBEDDED
from omnigen_pipe.workspace import Workspace

#: Where the model `embedded` lies, in diffusers' layout: it is shipped with the package.
EMBEDDED_FOLDER = Path(__file__).resolve().parent / "embedded" / "model"

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
    start = workspace.root
    if part == "vae" and model.pretrained_vae_model_name_or_path is not None:
        return vae_folder(model.pretrained_vae_model_name_or_path, start=start, download=download)
    name = model.pretrained_model_name_or_path
    return part_folder(name, part, start=start, revision=model.revision, download=download)


def part_folder(
    name: str, part: str, *, start: Path, revision: str | None = None, download: bool = True
) -> Path | None:
    """The folder of one part of the model `name`: transformer, vae, tokenizer, scheduler.

    `name` is `embedded`, a folder (a relative one starts at the folder `start`) or a hub id, of
    which `revision` is a branch, tag or commit. None only without `download`, where the part would
    have to be fetched first. Raises `UsageError` where the model is not usable.
    """
    folder = _resolve(name, start, revision, [f"{part}/{p}" for p in _PATTERNS], download)
    if folder is not None and not (folder / part).is_dir():
        if not download and not is_local(name, start):
            return None  # the cache holds other parts only
        raise UsageError(
            f"{name} has no folder `{part}/`. pretrained_model_name_or_path must name an OmniGen "
            "in diffusers' layout, with transformer/, vae/, tokenizer/ and scheduler/."
        )
    return folder / part if folder is not None else None


def vae_folder(name: str, *, start: Path, download: bool = True) -> Path | None:
    """The folder of a VAE that stands alone, or is the `vae/` of a model; as `part_folder`."""
    patterns = [*_PATTERNS, *(f"vae/{p}" for p in _PATTERNS)]
    vae = _resolve(name, start, None, patterns, download)
    return vae / "vae" if vae is not None and (vae / "vae").is_dir() else vae


def beside_parts(
    name: str, file: str, *, start: Path, revision: str | None = None, download: bool = True
) -> Path | None:
    """The file `file` (such as `model_index.json`) that lies beside the parts of the model `name`;
    None where the model has none, or, without `download`, where it would have to be fetched.

    Raises `UsageError` as `part_folder` does.
    """
    folder = _resolve(name, start, revision, [file], download)
    return folder / file if folder is not None and (folder / file).is_file() else None


def is_local(name: str, start: Path) -> bool:
    """Whether the model `name` is here without the hub: a folder, or the one of the package."""
    return name == EMBEDDED or _local(name, start).is_dir()


def _local(name: str, start: Path) -> Path:
    return (start / Path(name).expanduser()).absolute()


def _resolve(
    name: str, start: Path, revision: str | None, patterns: list[str], download: bool
) -> Path | None:
    """The local folder of `name`, downloaded (what matches `patterns`) where it is a hub id."""
    if name == EMBEDDED:
        if not EMBEDDED_FOLDER.is_dir():
            raise UsageError(
                f"The embedded model is not in this installation: there is no {EMBEDDED_FOLDER}. "
                "Install omnigen-pipe again, or name another model."
            )
        return EMBEDDED_FOLDER
    local = _local(name, start)
    if local.is_dir():
        return local
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UsageError(f"The model folder {local} does not exist.")
    if not download:
        return hub.cached(name, "model", revision, patterns)
    what = f"`{name}` is not a folder ({local}), and the model of that name"
    return hub.fetch(name, "model", revision, patterns, what=what)
