"""Where the parts of the model lie: a folder in diffusers' layout, a download from the hub, or the
package itself.

Imports no torch: the VAE's and the tokenizer's keys are needed before anything is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import UsageError
from omnigen_pipe import hub
from omnigen_pipe.config import EMBEDDED
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Self

#: Where the model `embedded` lies, in diffusers' layout: it is shipped with the package.
EMBEDDED_FOLDER = Path(__file__).resolve().parent / "embedded" / "model"

#: Weights are read from safetensors only; nothing is ever unpickled.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")

#: The VAE shrinks each side by this.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Model:
    """A model in diffusers' layout by its `name`: `embedded`, a folder or a hub id.

    A relative folder starts at the folder `start`. `revision` is a branch, tag or commit of a hub
    id, and `vae` names another VAE than the model's own.
    """

    name: str
    start: Path
    revision: str | None = None
    vae: str | None = None

    @classmethod
    def of(cls, workspace: Workspace) -> Self:
        """The model of a workspace."""
        model = workspace.config.model
        return cls(
            model.pretrained_model_name_or_path,
            workspace.root,
            model.revision,
            model.pretrained_vae_model_name_or_path,
        )

    @property
    def label(self) -> str:
        """What it is called where others read it: `embedded`, the hub id, or the folder's own name;
        where a folder lies on this machine is nobody else's business."""
        if self.name == EMBEDDED or (not self.is_local and _may_be_hub_id(self.name)):
            return self.name
        # Without `..`, but with symbolic links as they are: they may speak, and what they lead to
        # may be a hash.
        return Path(os.path.abspath(_local(self.name, self.start))).name

    def without_folders(self, sentence: str) -> str:
        """`sentence` for those who read it elsewhere: folders of the model are called by their own
        names, and where they, the workspace and the home folder lie is left out."""
        names: dict[str, str] = {}
        for name in (self.name, self.vae):
            if name is not None and name != EMBEDDED:
                folder = _local(name, self.start)
                own = Path(os.path.abspath(folder)).name
                written = name if name.startswith(("/", "~")) else str(folder)
                names |= dict.fromkeys((str(folder), os.path.abspath(folder), written), own)
        for written in sorted(names, key=len, reverse=True):
            sentence = sentence.replace(written, names[written])
        sentence = sentence.replace(f"{self.start}/", "")
        home = os.path.expanduser("~")
        return sentence.replace(f"{home}/", "~/") if home.strip("/") else sentence

    @property
    def is_local(self) -> bool:
        """Whether it is here without the hub: a folder, or the one of the package."""
        return self.name == EMBEDDED or _local(self.name, self.start).is_dir()

    def part(self, part: str) -> Path:
        """The folder of one part: transformer, vae, tokenizer, scheduler.

        Downloads from the hub what is not in its cache (huggingface_hub's HF_ENDPOINT, HF_HOME and
        login are respected). Raises `UsageError` where the folder or repository is not usable.
        """
        found = self._part(part, download=True)
        assert found is not None  # only without a download
        return found

    def local_part(self, part: str) -> Path | None:
        """The same without a download: None where it would have to be fetched first."""
        return self._part(part, download=False)

    def beside(self, file: str) -> Path | None:
        """The file `file` (such as `model_index.json`) that lies beside the parts; None where the
        model has none. Raises `UsageError` as `part` does."""
        folder = _resolve(self.name, self.start, self.revision, [file], download=True)
        return folder / file if folder is not None and (folder / file).is_file() else None

    def pinned(self) -> Self:
        """This model at one commit: of a hub id the one that its revision stands for now, so that
        all parts are of one state; anything else as it is. Raises `UsageError` as `part` does."""
        if self.is_local:
            return self
        patterns = ["transformer/config.json"]
        folder = _resolve(self.name, self.start, self.revision, patterns, download=True)
        assert folder is not None  # only without a download
        return replace(self, revision=folder.name)  # the hub's cache names it by the commit

    def _part(self, part: str, download: bool) -> Path | None:
        if part == "vae" and self.vae is not None:
            return self._other_vae(self.vae, download)
        patterns = [f"{part}/{p}" for p in _PATTERNS]
        folder = _resolve(self.name, self.start, self.revision, patterns, download)
        if folder is not None and not (folder / part).is_dir():
            if not download and not self.is_local:
                return None  # the cache holds other parts only
            wanted = "diffusers' layout, with transformer/, vae/, tokenizer/ and scheduler/"
            if self._is_of_the_authors(folder):
                raise UsageError(
                    f"{self.name} is an OmniGen in its authors' layout, and what is named by "
                    f"--model or pretrained_model_name_or_path must have {wanted}: name "
                    "Shitao/OmniGen-v1-diffusers, or export with `--layout diffusers`."
                )
            raise UsageError(
                f"{self.name} has no folder `{part}/`. What is named by --model or "
                f"pretrained_model_name_or_path must be an OmniGen in {wanted}."
            )
        return folder / part if folder is not None else None

    def _is_of_the_authors(self, folder: Path) -> bool:
        """Whether it is what the authors published, or `export --layout omnigen` writes."""
        weights = (folder / "model.safetensors").is_file()
        return self.name == "Shitao/OmniGen-v1" or (weights and (folder / "config.json").is_file())

    def _other_vae(self, name: str, download: bool) -> Path | None:
        """The folder of a VAE that stands alone, or is the `vae/` of a model."""
        patterns = [*_PATTERNS, *(f"vae/{p}" for p in _PATTERNS)]
        vae = _resolve(name, self.start, None, patterns, download)
        return vae / "vae" if vae is not None and (vae / "vae").is_dir() else vae


def lone_model(
    workspace: Workspace,
    name: str,
    revision: str | None,
    weights: str = "diffusion_pytorch_model",
    *,
    download: bool = True,
) -> Path | None:
    """The folder of a model that is no OmniGen, and has no parts: a folder, or downloaded from the
    hub. Its weights are in safetensors whose names begin with `weights`.

    Without `download` None where it would have to be fetched first. Raises `UsageError` where there
    is none.
    """
    patterns = ["*.json", f"{weights}*.safetensors"]
    return _resolve(name, workspace.root, revision, patterns, download)


def model_part(workspace: Workspace, part: str) -> Path:
    """The folder of one part of the configured model; as `Model.part`."""
    return Model.of(workspace).part(part)


def local_model_part(workspace: Workspace, part: str) -> Path | None:
    """The same without a download: None where it would have to be fetched first."""
    return Model.of(workspace).local_part(part)


def _local(name: str, start: Path) -> Path:
    return (start / Path(name).expanduser()).absolute()


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


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
    if not _may_be_hub_id(name):
        raise UsageError(f"The model folder {local} does not exist.")
    if not download:
        return hub.cached(name, "model", revision, patterns)
    what = f"`{name}` is not a folder ({local}), and the model of that name"
    return hub.fetch(name, "model", revision, patterns, what=what)


def transformer_config(folder: Path) -> dict[str, Any]:
    """The transformer's `config.json`; raises `UsageError` where it is not readable."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not the configuration of a transformer.")
    return config


def longest_side(config: Mapping[str, Any]) -> int:
    """The longest side in pixels that the transformer of this `config` has positions for; raises
    `UsageError` where it does not say."""
    try:
        return int(config["pos_embed_max_size"]) * int(config["patch_size"]) * PIXELS_PER_LATENT
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"This is no transformer of OmniGen: {error!r} in its config.") from error
