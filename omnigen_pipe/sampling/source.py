"""The model that draws: where its parts lie, what it is called, and how it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import PipeError
from omnigen_pipe.config import EMBEDDED, VaeConfig
from omnigen_pipe.model_files import beside_parts, is_local, part_folder, vae_folder
from omnigen_pipe.prompts.tokenizer import PromptTokenizer
from omnigen_pipe.prompts.tokenizer import load as load_tokenizer
from omnigen_pipe.sampling.requests import DEFAULTS_NAME, Settings, model_settings
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """A model by `name`, as `model_files.part_folder` takes it, and the options of its VAE.

    `vae` names another VAE than the model's own.
    """

    name: str
    start: Path
    revision: str | None = None
    vae: str | None = None
    vae_options: VaeConfig = field(default_factory=VaeConfig)

    @classmethod
    def of(cls, workspace: Workspace) -> Source:
        """The model of a workspace."""
        config = workspace.config
        return cls(
            config.model.pretrained_model_name_or_path,
            workspace.root,
            config.model.revision,
            config.model.pretrained_vae_model_name_or_path,
            config.vae,
        )

    @property
    def label(self) -> str:
        """What pictures say drew them: `embedded`, the hub id, or the folder's own name."""
        if self.name == EMBEDDED or not is_local(self.name, self.start):
            return self.name
        # Without `..`, but with symbolic links as they are: they may speak, and what they lead to
        # may be a hash.
        return Path(os.path.abspath(self.start / Path(self.name).expanduser())).name

    def folder(self, part: str) -> Path:
        """The folder of a part; raises `UsageError` where the model is not usable."""
        if part == "vae" and self.vae is not None:
            found = vae_folder(self.vae, start=self.start)
        else:
            found = part_folder(self.name, part, start=self.start, revision=self.revision)
        assert found is not None  # only without a download
        return found

    def settings(self) -> Settings:
        """How its makers want it to be used: its `generation.json`, else diffusers' defaults."""
        path = beside_parts(
            self.name, DEFAULTS_NAME, start=self.start, revision=self.revision, download=True
        )
        return model_settings(path)

    def tokenizer(self) -> PromptTokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.folder("tokenizer"))

    def pipeline(
        self,
        tokenizer: PromptTokenizer,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Path | None = None,
        strength: float = 1.0,
    ) -> Any:
        """diffusers' pipeline (see `pipeline.build_pipeline`), the transformer in `dtype`.

        `adapter` is the file of one that is attached at `strength` times its own. What is small
        and could be wrong is loaded first. Raises `UsageError` or `PipeError` where a part or the
        adapter cannot be used.
        """
        import torch

        from omnigen_pipe.latents.vae import load_vae
        from omnigen_pipe.model.lokr import adapter_config, attach_file
        from omnigen_pipe.model.transformer import load_transformer
        from omnigen_pipe.sampling.pipeline import build_pipeline, load_scheduler

        if adapter is not None:
            adapter_config(adapter)
        scheduler = load_scheduler(self.folder("scheduler"))
        # SDXL's VAE overflows in half precision.
        options = self.vae_options.model_copy(update={"vae_dtype": "fp32"})
        try:
            vae = load_vae(self.folder("vae"), options, device)
            transformer = load_transformer(self.folder("transformer"), dtype, device)
            if adapter is not None:
                attach_file(transformer, adapter, strength).to(device)
        except torch.OutOfMemoryError as error:
            raise PipeError(
                f"{device} has too little memory for {self.label}. Free memory that other "
                "programs use, or choose another --device."
            ) from error
        return build_pipeline(transformer, vae, scheduler, tokenizer)
