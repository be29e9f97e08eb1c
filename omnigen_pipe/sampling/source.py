"""The model that draws: how it is loaded, and how its makers want it to be used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import PipeError
from omnigen_pipe.config import VaeConfig
from omnigen_pipe.model_files import Model
from omnigen_pipe.prompts.tokenizer import PromptTokenizer
from omnigen_pipe.prompts.tokenizer import load as load_tokenizer
from omnigen_pipe.sampling.requests import DEFAULTS_NAME, Settings, model_settings
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


@dataclass(frozen=True)
class Source(Model):
    """A model, and the options of its VAE."""

    vae_options: VaeConfig = field(default_factory=VaeConfig)

    @classmethod
    def of(cls, workspace: Workspace) -> Self:
        """The model of a workspace."""
        return replace(super().of(workspace), vae_options=workspace.config.vae)

    def settings(self) -> Settings:
        """How its makers want it to be used: its `generation.json`, else diffusers' defaults."""
        return model_settings(self.beside(DEFAULTS_NAME))

    def tokenizer(self) -> PromptTokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.part("tokenizer"))

    def outline(self) -> Any:
        """Its transformer's shapes; see `transformer.outline`. Of a model on the hub this fetches
        the configuration only."""
        from omnigen_pipe.model.transformer import outline

        config = self.beside("transformer/config.json")
        return outline(self.part("transformer") if config is None else config.parent)

    def check(self, adapter: Path | None) -> None:
        """Raise `UsageError` or `PipeError` where the scheduler, or the adapter in the file
        `adapter`, cannot be used; no weights of the model are read, nor fetched."""
        from omnigen_pipe.model.lokr import attach_file
        from omnigen_pipe.sampling.pipeline import load_scheduler

        load_scheduler(self.part("scheduler"))
        if adapter is not None:
            attach_file(self.outline(), adapter)

    def decoder(self, device: torch.device) -> Any:
        """Its VAE on `device`, for decoding; raises `UsageError` where it cannot be used."""
        from omnigen_pipe.latents.vae import load_vae

        # SDXL's VAE overflows in float16, and bfloat16 has no more digits than a picture.
        options = self.vae_options.model_copy(update={"vae_dtype": "fp32"})
        return load_vae(self.part("vae"), options, device)

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
        and `via` are those of `load_transformer`. `check` finds sooner what is wrong. Raises
        `UsageError` or `PipeError` where a part or the adapter cannot be used.
        """
        import torch

        from omnigen_pipe.model.lokr import attach_file
        from omnigen_pipe.model.transformer import load_transformer
        from omnigen_pipe.sampling.pipeline import build_pipeline, load_scheduler, set_strength

        scheduler = load_scheduler(self.part("scheduler"))
        try:
            vae = self.decoder(device)
            transformer = load_transformer(
                self.part("transformer"), dtype, device, base_precision, via
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
