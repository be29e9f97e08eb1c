"""One step of training at true scale on the CPU, through the project's own loading and loop.

    python tests/benchmarks/true_scale.py
    python tests/benchmarks/true_scale.py --folder /scratch --resolution 256 --json

Writes OmniGen-v1's transformer with random bfloat16 weights (7.5 GB in `--folder`, deleted
afterwards), a block at a time, loads it as `train` does, attaches the quickstart's LoKr adapter,
and takes one optimizer step on one square sample of random numbers. It needs about 10 GB of
memory and some minutes, says how long each part took and how much memory it held, and compares
the latter with `omnigen-pipe estimate`. Linux only, for the peak of a part of a process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from process_memory import memory_of_process  # noqa: E402

from omnigen_pipe.config import LokrConfig, parse  # noqa: E402
from omnigen_pipe.memory.estimate import GIB, PARTS, estimate_peak  # noqa: E402
from omnigen_pipe.memory.skeleton import OMNIGEN_V1, blocks, transformer_of  # noqa: E402
from omnigen_pipe.progress import Progress  # noqa: E402
from omnigen_pipe.runs import checkpoints  # noqa: E402
from omnigen_pipe.runs.checkpoints import Position  # noqa: E402
from omnigen_pipe.runs.metrics import METRICS_NAME, MetricsWriter  # noqa: E402
from omnigen_pipe.runs.order import MicroBatch, epoch_order  # noqa: E402
from omnigen_pipe.stop import StopRequest  # noqa: E402
from omnigen_pipe.training.batches import Batch  # noqa: E402
from omnigen_pipe.training.loop import Course, train  # noqa: E402
from omnigen_pipe.training.plan import Plan  # noqa: E402
from omnigen_pipe.training.state import write_state  # noqa: E402
from omnigen_pipe.training.trainee import load_trainee  # noqa: E402
from omnigen_pipe.workspace import Workspace  # noqa: E402

PROMPT_TOKENS = 60


def write_transformer(folder: Path, shapes: Mapping[str, Any]) -> int:
    """Write a transformer with random bfloat16 weights, a file per block; returns its bytes."""
    skeleton = transformer_of(shapes, blocks(shapes), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in skeleton.state_dict().items():
        block = name.split(".")[1] if name.startswith("layers.") else "rest"
        files.setdefault(f"diffusion_pytorch_model-{block}.safetensors", {})[name] = tensor.shape
    skeleton.save_config(folder)
    for file, named in files.items():
        tensors = {}
        for name, shape in named.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            tensor = tensor.normal_(0, 0.02, generator=generator)
            tensors[name] = tensor.add_(1) if "norm" in name and len(shape) == 1 else tensor
        save_file(tensors, folder / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {n: file for file, named in files.items() for n in named},
    }
    index_path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_path.write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read(side: int) -> Batch:
    """One sample of random numbers, in place of what the reader takes from the shards."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, 4, side // 8, side // 8, generator=generator)
    return Batch(
        sample_ids=["random"],
        bucket=f"{side}x{side}",
        x1=latents[0],
        x0=latents[1],
        t=torch.tensor([0.5]),
        prompts=[list(range(10, 10 + PROMPT_TOKENS))],
        regularisation=torch.zeros(1, dtype=torch.bool),
    )


def measure(
    folder: Path, shapes: Mapping[str, Any], side: int, progress: Progress
) -> dict[str, Any]:
    """Write, load, one step, checkpoint; what each took, in seconds and bytes."""
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(part: str) -> None:
        nonlocal started
        seconds[part] = round(time.monotonic() - started, 1)
        progress.note(f"{part}: {seconds[part]} s")
        started = time.monotonic()

    model = folder / "model" / "transformer"
    model.mkdir(parents=True)
    written = write_transformer(model, shapes)
    lap("writing random weights")

    settings = {"mixed_precision": "bf16", "max_train_steps": 1, "lr_warmup_steps": 0}
    named = {"pretrained_model_name_or_path": str(model.parent)}
    config = parse({"model": named, "train": settings}, "true scale")
    workspace, lokr = Workspace(folder, config), LokrConfig()
    before = memory_of_process("VmRSS")
    restart_peak()
    trainee = load_trainee(workspace, lokr, torch.device("cpu"))
    lap("loading, attaching the adapter")
    loading = memory_of_process("VmHWM")

    saved: list[checkpoints.Checkpoint] = []
    peak = 0

    def save(position: Position) -> None:
        nonlocal peak
        peak = memory_of_process("VmHWM")
        lap("one step")
        saved.append(
            checkpoints.save(
                folder / "checkpoints",
                workspace.staging,
                position,
                lambda path: write_state(trainee, path, lokr, position.step),
            )
        )

    def order(epoch: int) -> Any:
        zeros = np.zeros(1, dtype=np.int64)
        return epoch_order(zeros, zeros, seed=0, epoch=epoch, batch_size=1, micro_batches=1)

    def reader(micro: MicroBatch, epoch: int, step: int) -> Batch:
        return read(side)

    restart_peak()
    with MetricsWriter(folder) as metrics:
        variance = (1.0, 1.0, 1.0, 1.0)
        course = Course(reader, save, variance, progress, StopRequest(), metrics)
        train(trainee, Plan(Position(), 1, order), config.train, course)
    lap("checkpoint")
    line = json.loads((folder / METRICS_NAME).read_text(encoding="utf-8"))
    estimated = estimate_peak(shapes, config.train, lokr, f"{side}x{side}", 1, PROMPT_TOKENS)
    return {
        "parameters": sum(p.numel() for p in trainee.transformer.parameters()),
        "weights_file_bytes": written,
        "targets": [target.describe() for target in trainee.targets],
        "adapter_parameters": sum(p.numel() for p in trainee.parameters()),
        "adapter_file_bytes": saved[-1].adapter.stat().st_size,
        "seconds": seconds,
        "loss": line["loss"],
        "grad_norm": line["grad_norm"],
        "threads": torch.get_num_threads(),
        "process_before_loading": before,
        "peak_of_loading": loading,
        "peak_of_step": peak,
        "peak_with_checkpoint": memory_of_process("VmHWM"),
        "estimated": {part: getattr(estimated, part) for part in PARTS if part != "context"},
        "estimated_allocated": estimated.allocated,
    }


def restart_peak() -> None:
    """Let VmHWM begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    gib = {name: f"{size / GIB:.2f} GiB" for name, size in found.items() if isinstance(size, int)}
    print(f"base model           {found['parameters']:,} parameters")
    for target in found["targets"]:
        print(f"                     {target}")
    size = found["adapter_file_bytes"]
    print(
        f"adapter              {found['adapter_parameters']:,} parameters, {size:,} bytes on disk"
    )
    for part, took in found["seconds"].items():
        print(f"{took:>9.1f} s          {part}")
    print(f"threads              {found['threads']}")
    print(f"loss, gradient norm  {found['loss']:.4f}, {found['grad_norm']:.4f}")
    print(f"before loading       {gib['process_before_loading']}")
    print(f"peak of loading      {gib['peak_of_loading']}, weights being mapped from their files")
    print(f"peak of the step     {gib['peak_of_step']}")
    beside = found["peak_of_step"] - found["process_before_loading"]
    print(f"  without what was there before loading  {beside / GIB:.2f} GiB")
    print(f"  as estimated, without CUDA's context   {gib['estimated_allocated']}")
    for part, part_size in found["estimated"].items():
        if part_size:
            print(f"    {part:<18} {part_size / GIB:.2f} GiB")
    print(f"peak of checkpoint   {gib['peak_with_checkpoint']}")


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the 7.5 GB go (default: /tmp or TMPDIR)")
    parser.add_argument("--resolution", type=int, default=256, help="side in pixels")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), OMNIGEN_V1, options.resolution, Progress())
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
