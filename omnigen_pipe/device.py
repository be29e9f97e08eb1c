"""Which device computes, in which precision it can, and how much memory it has used."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from manifests.errors import UsageError


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; without a name the first CUDA device, else the CPU.

    Raises `UsageError` for anything but `cpu` and CUDA devices that are there.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: torch knows no such device.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA devices.")
        torch.cuda.set_device(device)  # not every library asks where its tensors lie
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of base weights and autocast for `mixed_precision = name` on `device`."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[name]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes bfloat16 in hardware: NVIDIA's from Ampere (8.0) on, AMD's."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def free_memory() -> None:
    """Give memory that nothing uses any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def release_memory() -> None:
    """The same, and measure the GPU's peak anew."""
    free_memory()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it float32 is float32: no TF32, and the same algorithms every time."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, GiB: on CUDA torch's allocations, else the process' own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
