"""What LoKr's bypass mode costs, against LyCORIS' rebuild mode and against no adapter.

    python tests/benchmarks/lokr_modes.py
    python tests/benchmarks/lokr_modes.py --tokens 256 1024 --repeats 7

Runs forward and backward of blocks of OmniGen's true widths with random weights, the guide's
adapter on attention and MLP, without gradient checkpointing. Times are medians of ratios: the
modes take turns within one process, so what else the machine does hits them alike. Memory is the
peak over the weights of a process that does one step. Then, at OmniGen's widths, how far the
adapter's contribution is from the exact one, for deltas of three sizes, base in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import torch  # noqa: E402
from process_memory import memory_of_process  # noqa: E402
from torch import nn  # noqa: E402

from omnigen_pipe.config import LokrConfig  # noqa: E402
from omnigen_pipe.model import lokr  # noqa: E402
from omnigen_pipe.model.attention import MaskFreeAttention, spans  # noqa: E402

MODES = ("no adapter", "bypass", "rebuild")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Width, MLP width and heads of OmniGen-v1.
WIDTHS = (3072, 8192, 32)
#: Size of random base weights, and sizes of the adapter's delta on them, root mean square.
WEIGHT_RMS = 0.02
DELTA_RMS = (6e-5, 6e-4, 6e-3)
PROMPT_TOKENS = 20


def build(dtype: torch.dtype, blocks: int, widths: tuple[int, int, int]) -> tuple[Any, Any]:
    """Frozen random blocks, and the guide's adapter on them with small random weights."""
    from diffusers.models.transformers.transformer_omnigen import OmniGenBlock

    width, inner, heads = widths
    with torch.device("meta"):
        model = nn.ModuleList(OmniGenBlock(width, heads, heads, inner, 1e-5) for _ in range(blocks))
    model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, WEIGHT_RMS, generator=generator)
    for block in model:
        block.self_attn.set_processor(MaskFreeAttention())
    network = lokr.attach(model, LokrConfig(), seed=0)
    _draw(network, 1e-3)
    return model, network


def _draw(network: Any, rms: float) -> None:
    """Random factors whose Kronecker product has the root mean square `rms`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.loras:
            module.lokr_w1.normal_(0, 1, generator=generator)
            module.lokr_w2.normal_(0, rms, generator=generator)


def set_mode(network: Any, mode: str) -> None:
    """Make every module of the adapter work in `mode`, one of `MODES`."""
    for module in network.loras:
        module.bypass_mode = mode != "rebuild"
        # Not LyCORIS' own restore and apply_to: applied twice, it would call itself.
        forward = module.org_forward if mode == "no adapter" else module.forward
        module.org_module[0].forward = forward


def step(model: Any, network: Any, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of one forward and backward pass over `tokens` tokens."""
    width = model[0].mlp.gate_up_proj.in_features
    x = torch.ones(1, tokens, width, dtype=dtype, requires_grad=True)
    span = spans([PROMPT_TOKENS])
    network.zero_grad()
    started = time.perf_counter()
    out = x
    for block in model:
        out = block(out, attention_mask=span, image_rotary_emb=None)
    out.sum().backward()
    return time.perf_counter() - started


def ratios(model: Any, network: Any, tokens: int, dtype: torch.dtype, repeats: int) -> Any:
    """Median seconds of the bypass mode, and each mode's time as a multiple of it."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repeats + 1):
        for mode in MODES:
            set_mode(network, mode)
            seconds[mode].append(step(model, network, tokens, dtype))
    bypass = seconds["bypass"][1:]  # the first pass sets kernels up
    found = {
        mode: statistics.median(s / b for s, b in zip(seconds[mode][1:], bypass, strict=True))
        for mode in MODES
    }
    return {"seconds": statistics.median(bypass), **found}


def accuracy(dtype: torch.dtype, widths: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    """Relative error of the adapter's contribution per delta size and mode, one square layer."""
    width = widths[0]
    holder = nn.Module()
    holder.attention = type("Attention", (nn.Module,), {})()
    holder.attention.linear = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    holder.attention.linear.weight.data.normal_(0, WEIGHT_RMS, generator=generator)
    config = LokrConfig.model_validate(
        {
            "apply_preset": {
                "target_module": ["Attention"],
                "module_algo_map": {"Attention": {"factor": 16}},
            }
        }
    )
    network = lokr.attach(holder, config, seed=0)
    module = network.loras[0]
    # The contribution alone: adding it to the base's output rounds alike in both modes.
    module.org_forward = lambda x: x.new_zeros(*x.shape[:-1], width)
    x = torch.randn(64, width, generator=generator).to(dtype)
    errors: dict[str, dict[str, float]] = {}
    for rms in DELTA_RMS:
        _draw(network, rms)
        with torch.no_grad():
            exact = x.double() @ torch.kron(module.lokr_w1, module.lokr_w2).double().T
            for mode in ("bypass", "rebuild"):
                module.bypass_mode = mode == "bypass"
                error = (module(x).double() - exact).norm() / exact.norm()
                errors.setdefault(f"{rms:g}", {})[mode] = float(error)
    return errors


def peak(mode: str, tokens: int, dtype: torch.dtype, blocks: int, widths: Any) -> int:
    """Bytes that one step needs over the built model. To be run in a process of its own."""
    model, network = build(dtype, blocks, widths)
    set_mode(network, mode)
    # Forgets the peak so far, which building had, and the parent before it.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_process("VmRSS")
    step(model, network, tokens, dtype)
    return memory_of_process("VmHWM") - before


def measure(
    dtypes: list[str], tokens: list[int], repeats: int, blocks: int, widths: Any
) -> list[dict[str, Any]]:
    """One row per dtype and number of tokens: times as ratios, and peaks in MiB on Linux."""
    rows = []
    for name in dtypes:
        model, network = build(DTYPES[name], blocks, widths)
        times = {n: ratios(model, network, n, DTYPES[name], repeats) for n in tokens}
        del model, network
        for number, took in times.items():
            row: dict[str, Any] = {"dtype": name, "tokens": number, "time": took}
            if sys.platform == "linux":
                row["peak_mib"] = {
                    mode: round(_child(mode, number, name, blocks, widths) / 2**20)
                    for mode in MODES
                }
            rows.append(row)
    return rows


def _child(mode: str, tokens: int, dtype: str, blocks: int, widths: Any) -> int:
    arguments = json.dumps([mode, tokens, dtype, blocks, widths])
    command = [sys.executable, __file__, "--peak-of", arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def show(rows: list[dict[str, Any]], errors: dict[str, dict[str, float]]) -> None:
    """Print both tables as Markdown."""
    print("| base | tokens | bypass | no adapter | rebuild | peak: no adapter, bypass, rebuild |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        took, peaks = row["time"], row.get("peak_mib")
        memory = " / ".join(str(peaks[mode]) for mode in MODES) + " MiB" if peaks else "–"
        print(
            f"| {row['dtype']} | {row['tokens']} | {took['seconds']:.2f} s | "
            f"{took['no adapter']:.2f} × | {took['rebuild']:.2f} × | {memory} |"
        )
    print()
    print("| size of the delta | bypass | rebuild |")
    print("|---|---|---|")
    for rms, error in errors.items():
        print(f"| {rms} | {error['bypass']:.2%} | {error['rebuild']:.2%} |")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=5, help="passes per mode and case")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--widths", nargs=3, type=int, default=list(WIDTHS))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak_of:
        mode, tokens, dtype, blocks, widths = json.loads(options.peak_of)
        print(peak(mode, tokens, DTYPES[dtype], blocks, tuple(widths)))
        return
    widths = tuple(options.widths)
    rows = measure(options.dtypes, options.tokens, options.repeats, options.blocks, widths)
    errors = accuracy(torch.bfloat16, widths)
    if options.json:
        print(json.dumps({"passes": rows, "bfloat16_errors": errors}))
        return
    print(
        f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
        f"torch {torch.__version__}; {options.blocks} block(s) of {widths[0]} and {widths[1]}\n"
    )
    show(rows, errors)


if __name__ == "__main__":
    main()
