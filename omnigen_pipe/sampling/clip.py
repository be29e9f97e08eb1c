"""CLIP scores: how well pictures fit their prompts, as torchmetrics computes them.

The score of a picture is 100 times the cosine between CLIP's features of it and of its prompt, and
0 where that is negative. It says something of the content, and nothing of the quality.

Prompts are tokenised by the `tokenizers` library from `tokenizer.json`, and cut with their end
token kept: torchmetrics would cut it off, and it is there that CLIP reads what the text means.
torch is imported where it is needed: whether scores can be had is known without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import UsageError
from omnigen_pipe.config import ValidationConfig
from omnigen_pipe.model_files import lone_model
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    import torch

_NO_TORCHMETRICS = (
    'evaluation_type = "clip" needs torchmetrics, which is not installed: '
    "`pip install 'omnigen-pipe[scores]'`, or set evaluation_type = \"none\"."
)
_OPTION = "pretrained_evaluation_model_name_or_path"
#: Of the files of weights.
_WEIGHTS = "model"


def is_wanted(options: ValidationConfig) -> bool:
    """Whether validation pictures are drawn, and scored."""
    return options.validation_step_interval > 0 and options.evaluation_type == "clip"


def check(workspace: Workspace) -> None:
    """Raise `UsageError` where scores are wanted and what computes them is not here; a model of the
    hub is not fetched."""
    if not is_wanted(workspace.config.validation):
        return
    try:
        version("torchmetrics")
    except PackageNotFoundError as error:
        raise UsageError(_NO_TORCHMETRICS) from error
    _folder(workspace, download=False)


def _folder(workspace: Workspace, download: bool) -> Path | None:
    options = workspace.config.validation
    name = options.pretrained_evaluation_model_name_or_path
    revision = options.pretrained_evaluation_model_revision
    return lone_model(workspace, name, revision, _WEIGHTS, download=download)


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP in main memory, which is on the device only while it scores."""

    #: What torchmetrics asks for: a model and its processor.
    model: _Features
    processor: _Processor
    #: torchmetrics' own function.
    clip_score: Any

    def is_cut(self, prompt: str) -> bool:
        """Whether `prompt` is longer than CLIP reads."""
        return bool(self.processor.tokenizer.encode(prompt).overflowing)

    def scores(self, pictures: Sequence[tuple[Path, str]], device: torch.device) -> Iterator[float]:
        """The score of each picture, a file and its prompt, from 0 to 100, computed on `device`.

        Raises `OSError` for a file that cannot be read, `ValueError` where a score is no number,
        and `RuntimeError` as torch does.
        """
        import numpy as np
        import torch
        from PIL import Image

        from omnigen_pipe.device import exact_float32

        def parts() -> tuple[_Features, _Processor]:
            return self.model, self.processor

        try:
            for path, prompt in pictures:
                with Image.open(path) as picture:
                    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
                # The model follows the picture to its device.
                image = pixels.permute(2, 0, 1).to(device)
                with torch.no_grad(), exact_float32():
                    score = float(self.clip_score(image, prompt, model_name_or_path=parts))
                if not math.isfinite(score):
                    raise ValueError(f"CLIP's score of {path.name} is {score}")
                yield score
        finally:
            self.model.to(torch.device("cpu"))


class _Features:
    """A CLIP as torchmetrics asks for it: since transformers 5 its features come with what they
    were made from."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.config = clip.config

    def to(self, device: torch.device) -> _Features:
        """Itself, on `device`."""
        self.clip.to(device)
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        """The features of pictures, `[B, D]`."""
        return _pooled(self.clip.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """The features of texts, `[B, D]`."""
        found = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return _pooled(found)


def _pooled(found: Any) -> Any:
    return getattr(found, "pooler_output", found)


class _Processor:
    """Pictures and texts as CLIP takes them; its call is what torchmetrics makes of a processor."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images = images
        self.tokenizer = tokenizer

    def __call__(
        self, *, images: list[Any] | None = None, text: list[str] | None = None, **_: object
    ) -> dict[str, Any]:
        """`pixel_values` of `images`, uint8 `[3, H, W]` each, or ids and mask of `text`."""
        import torch

        if images is not None:
            return {"pixel_values": self._images(images, return_tensors="pt")["pixel_values"]}
        (ids,) = (self.tokenizer.encode(one).ids for one in text or [])
        found = torch.tensor([ids])
        return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def load_scorer(workspace: Workspace) -> ClipScorer:
    """The CLIP that `workspace` names, fetched from the hub where it is to be.

    Raises `UsageError` where it cannot be had or used.
    """
    import torch

    try:  # now, and not when the first pictures are drawn
        with quiet_imports():
            from torchmetrics.functional.multimodal import clip_score
            from transformers import CLIPImageProcessor, CLIPModel
    except ImportError as error:
        raise UsageError(f"{_NO_TORCHMETRICS} ({error})") from error
    from safetensors import SafetensorError

    folder = _folder(workspace, download=True)
    assert folder is not None  # only without a download
    _check_kind(folder)
    try:
        with _no_bars():
            clip, loaded = CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        images = CLIPImageProcessor.from_pretrained(folder)
    # What transformers raises for damaged weights and wrong configurations: no common base.
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise _unusable(folder, " ".join(str(error).split())) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        few = ", ".join(missing[:3])
        raise _unusable(folder, f"{len(missing)} tensors are missing, such as {few}")
    clip.eval().requires_grad_(False)
    length = int(clip.config.text_config.max_position_embeddings)
    processor = _Processor(images, _tokenizer(folder, length))
    return ClipScorer(_Features(clip), processor, clip_score)


def _check_kind(folder: Path) -> None:
    """Raise `UsageError` where `folder` holds no CLIP, or not in safetensors."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(folder, f"its config.json says no model_type ({error})") from error
    if kind != "clip":
        raise _unusable(folder, f"it is a {kind}, not a clip")
    if not any(folder.glob(f"{_WEIGHTS}*.safetensors")):
        raise _unusable(
            folder,
            "it holds no weights in safetensors, and others are not read (openai/"
            "clip-vit-large-patch14 has them; on the hub a revision such as refs/pr/1 may)",
        )


def _tokenizer(folder: Path, length: int) -> Any:
    """The tokenizer in `folder`, which cuts texts to `length` tokens and keeps their end token."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself, not a subclass
        raise _unusable(folder, f"its tokenizer.json cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the library's own progress bars and reports."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _unusable(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"The CLIP in {folder} cannot be used: {why.rstrip('.')}. Name another in {_OPTION}, or "
        'set evaluation_type = "none".'
    )
