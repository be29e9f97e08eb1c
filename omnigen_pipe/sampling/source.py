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

    def outline(self) -> Any:
        """Its transformer's shapes; see `transformer.outline`. Of a model on the hub this fetches
        the configuration only."""
        from omnigen_pipe.model.transformer import outline

        config = beside_parts(
            self.name,
            "transformer/config.json",
            start=self.start,
            revision=self.revision,
            download=True,
        )
        return outline(self.folder("transformer") if config is None else config.parent)

    def pipeline(
        self,
        tokenizer: PromptTokenizer,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Path | None = None,
        strength: float = 1.0,
        base_precision: str = "no_change",
        via: str = "cpu",
    ) -> Any:
        """diffusers' pipeline (see `pipeline.build_pipeline`), the transformer in `dtype`.

        `adapter` is the file of one that is attached at `strength` times its own. `base_precision`
        and `via` are those of `load_transformer`. What is small and could be wrong is loaded
        first. Raises `UsageError` or `PipeError` where a part or the adapter cannot be used.
        """
        import torch

        from omnigen_pipe.latents.vae import load_vae
        from omnigen_pipe.model.lokr import attach_file
        from omnigen_pipe.model.transformer import load_transformer
        from omnigen_pipe.sampling.pipeline import build_pipeline, load_scheduler, set_strength

        scheduler = load_scheduler(self.folder("scheduler"))
        if adapter is not None:
            attach_file(self.outline(), adapter)
        # SDXL's VAE overflows in float16, and bfloat16 has no more digits than a picture.
        options = self.vae_options.model_copy(update={"vae_dtype": "fp32"})
        try:
            vae = load_vae(self.folder("vae"), options, device)
            transformer = load_transformer(
                self.folder("transformer"), dtype, device, base_precision, via
            )
            network = None
            if adapter is not None:
                network = attach_file(transformer, adapter).to(device)
        except torch.OutOfMemoryError as error:
            remedies = ["free memory that other programs use", "choose another --device"]
            if base_precision == "no_change":
                remedies.insert(0, "use --base-model-precision, such as int8-torchao")
            if dtype == torch.float32:
                remedies.insert(0, f"use --precision {_half_precision(device)}")
            raise PipeError(
                f"{device} has too little memory for {self.label}. To mend that, "
                f"{', or '.join(remedies)}."
            ) from error
        pipe = build_pipeline(transformer, vae, scheduler, tokenizer, network)
        if network is not None:
            set_strength(pipe, strength)
        return pipe


def _half_precision(device: torch.device) -> str:
    """The name of the 16 bits that `device` computes in."""
    import torch

    from omnigen_pipe.device import pick_precision

    return "bf16" if pick_precision("auto", device) == torch.bfloat16 else "fp16"
