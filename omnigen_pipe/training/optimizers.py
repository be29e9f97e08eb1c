"""The optimizers, by the names that SimpleTuner gives them.

All come from libraries, and all work on float32 parameters. This module adds what the libraries
leave open: that an optimizer which cannot run is named before training, how much memory its
state takes, and a way to look at schedule-free AdamW's averaged weights without changing what
is trained.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree

from manifests.errors import UsageError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.quiet import quiet_imports

#: Classes of bitsandbytes.optim.
_BITSANDBYTES = {
    "bnb-adamw": "AdamW",
    "bnb-adamw-paged": "PagedAdamW",
    "bnb-adamw8bit": "AdamW8bit",
    "bnb-adamw8bit-paged": "PagedAdamW8bit",
    "bnb-lion": "Lion",
    "bnb-lion-paged": "PagedLion",
    "bnb-lion8bit": "Lion8bit",
    "bnb-lion8bit-paged": "PagedLion8bit",
}

#: bitsandbytes keeps 8 bits per number only for tensors of at least so many numbers…
_MIN_8BIT_NUMBERS = 4096
#: …in blocks of so many, each with a float32 scale…
_BLOCK = 256
#: …and with one table of 256 float32 values per kind of state, which all tensors share.
_MAP_BYTES = 256 * 4
#: It pages only tensors of at least so many numbers.
_MIN_PAGED_NUMBERS = 100_000

#: Prodigy's learning rate is a multiplier; its authors keep to 1, and to this range at the most.
_PRODIGY_RATES = (0.5, 2.0)


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimizer over float32 `parameters`, which lie on `device`.

    Raises `UsageError` where it cannot run there: bitsandbytes is not installed, or has no
    kernel for the device.
    """
    name = config.optimizer
    decay = config.adam_weight_decay
    adam: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    lion: dict[str, Any] = {"betas": (config.lion_beta1, config.lion_beta2)}
    built: torch.optim.Optimizer
    if name in _BITSANDBYTES:
        kind = _bitsandbytes_class(name, device)
        options = lion if "lion" in name else adam
        # Where it does not page, `note` says so; the library would at the first step.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported")
        with quiet_imports():
            built = kind(parameters, lr=config.learning_rate, weight_decay=decay, **options)
    elif name == "lion":
        built = Lion(parameters, lr=config.learning_rate, weight_decay=decay, **lion)
    elif name == "prodigy":
        # As its authors advise for diffusion models, and, for the safeguard, wherever there is a
        # warm-up: without it the small rates of the warm-up stay in the estimate's denominator
        # and inflate the estimate. Their advice of a weight decay of 0.01 is left to the user.
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line about its decay
            built = Prodigy(
                parameters,
                lr=config.learning_rate,
                weight_decay=decay,
                decouple=True,
                use_bias_correction=True,
                safeguard_warmup=True,
                d_coef=config.prodigy_d_coef,
                **adam,
            )
    elif name == "adamw_schedulefree":
        # Without its own warm-up: the loop sets the rate of every step, by the same formula.
        free = AdamWScheduleFree(parameters, lr=config.learning_rate, weight_decay=decay, **adam)
        free.train()
        built = free
    else:
        built = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=decay, **adam)
    return built


def _bitsandbytes_class(name: str, device: torch.device) -> Any:
    """The class called `name`, tried out on `device`."""
    try:
        # It warns on the CPU of a kernel that is for 4-bit inference only.
        with quiet_imports():
            import bitsandbytes
    except ImportError as error:
        raise UsageError(
            f'optimizer = "{name}" needs bitsandbytes, which cannot be imported here ({error}). '
            "Install it with `pip install 'omnigen-pipe[quantised]'`, or set optimizer to "
            f"`{_alternative(name)}`."
        ) from error
    kind = getattr(bitsandbytes.optim, _BITSANDBYTES[name])
    # What has a kernel where differs by version, and shows only at the first step.
    numbers = _MIN_PAGED_NUMBERS if _pages(name, device) else _MIN_8BIT_NUMBERS
    weights = torch.nn.Parameter(torch.zeros(numbers, device=device))
    weights.grad = torch.zeros_like(weights)
    try:
        with quiet_imports():
            kind([weights], lr=1e-4).step()
    except RuntimeError as error:
        raise UsageError(
            f'optimizer = "{name}" does not run on {device} with bitsandbytes '
            f"{bitsandbytes.__version__}: {str(error).splitlines()[0]} Set optimizer to "
            f"`{_alternative(name)}`, which runs anywhere, or train on a CUDA GPU."
        ) from error
    return kind


def _alternative(name: str) -> str:
    return "lion" if "lion" in name else "adamw"


def _pages(name: str, device: torch.device) -> bool:
    return name.endswith("-paged") and device.type == "cuda"


def note(config: TrainConfig, device: torch.device) -> str | None:
    """What a user should know of the configured optimizer before training on `device`."""
    name, rate = config.optimizer, config.learning_rate
    low, high = _PRODIGY_RATES
    if name == "adamw_bf16":
        return "adamw_bf16 is AdamW here: adapter weights are float32 whatever the base model is."
    if name == "prodigy" and not low <= rate <= high:
        return (
            f"prodigy finds its own rate, and learning_rate = {rate:g} multiplies it. Set "
            "learning_rate = 1; prodigy_d_coef is the key to tune."
        )
    if name.endswith("-paged") and not _pages(name, device):
        return f"{name} pages to main memory from CUDA only; on {device} it does not page."
    return None


def state_bytes(parameters: Iterable[torch.Tensor], config: TrainConfig) -> int:
    """Bytes that the optimizer's state takes after its first step, for these float32 tensors.

    Only shapes are read, so tensors on the meta device will do. Exact but for Prodigy, where it
    is an upper bound: of a parameter that is all zeros at the first step it keeps no copy. The
    state of paged optimizers may lie in main memory.
    """
    sizes = [parameter.numel() for parameter in parameters]
    numbers = sum(sizes)
    name = config.optimizer
    if name in _BITSANDBYTES:
        states = 1 if "lion" in name else 2
        if "8bit" not in name:
            return 4 * states * numbers
        large = [size for size in sizes if size >= _MIN_8BIT_NUMBERS]
        quantised = sum(size + 4 * -(-size // _BLOCK) for size in large)
        maps = _MAP_BYTES if large else 0
        return states * (quantised + maps + 4 * (numbers - sum(large)))
    if name == "lion":
        return 4 * numbers
    if name == "prodigy":
        # Its own two, the start and the weighted sum of gradients, and Adam's moments.
        return 4 * numbers * (4 if config.adam_beta1 > 0 else 3)
    if name == "adamw_schedulefree":
        return 8 * numbers
    return 8 * numbers + 4 * len(sizes)  # a step count per tensor


def has_averaged_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what is trained (y) and what is to be used, evaluated and saved (x) differ."""
    return isinstance(optimizer, AdamWScheduleFree)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the averaged weights x in place of the trained ones y, which come back to the last bit.

    The library reckons x from y and back, with rounding each way; so y is kept as a copy, which
    takes as much memory as the parameters. Without averaged weights nothing is done, nor inside
    another such visit. The optimizer must not step, nor its state be saved, during the visit.
    """
    if not isinstance(optimizer, AdamWScheduleFree) or not optimizer.param_groups[0]["train_mode"]:
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, y in zip(parameters, trained, strict=True):
                parameter.copy_(y)
