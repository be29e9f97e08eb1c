"""What an adapter file holds: its configuration, its size, and how far it moved each module.

Read from the file alone: neither the base model nor LyCORIS is needed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from manifests.errors import PipeError
from omnigen_pipe.model.lokr import read_adapter
from omnigen_pipe.model.merging import delta_of


@dataclass(frozen=True)
class ModuleReport:
    """One adapted linear layer: shape of its change, parameters spent, and its size (rms)."""

    name: str
    rows: int
    columns: int
    parameters: int
    delta_rms: float


@dataclass(frozen=True)
class AdapterReport:
    """A whole file: its metadata, and every module in name order."""

    path: str
    metadata: dict[str, str]
    modules: list[ModuleReport]

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        return sum(module.parameters for module in self.modules)

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {**asdict(self), "parameters": self.parameters}


def inspect_adapter(path: Path) -> AdapterReport:
    """Report on an adapter file; raises `PipeError` where it holds no LoKr."""
    tensors, metadata = read_adapter(path)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = tensor.float()
    modules = [
        _module(name, part, f"The adapter {path}")
        for name, part in sorted(parts.items())
        if any(p.startswith("lokr_w1") for p in part)
    ]
    if not modules:
        raise PipeError(f"{path} holds no LoKr modules: it is another kind of file.")
    return AdapterReport(str(path), metadata, modules)


def _module(name: str, part: dict[str, torch.Tensor], who: str) -> ModuleReport:
    delta = delta_of(name, part, who)
    rows, columns = delta.shape
    parameters = sum(t.numel() for p, t in part.items() if p.startswith("lokr_"))
    return ModuleReport(name, rows, columns, parameters, delta.norm / math.sqrt(rows * columns))


def show_report(report: AdapterReport) -> None:
    """Print a report for a person on stdout."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(report.path, markup=False)
    for name, value in sorted(report.metadata.items()):
        console.print(f"  {name}: {value}", markup=False)
    columns = ("module", "change", "parameters", "rms")
    table = Table(*(Column(name, no_wrap=True) for name in columns), show_edge=False)
    for module in report.modules:
        table.add_row(
            module.name.removeprefix("lycoris_"),
            f"{module.rows} x {module.columns}",
            f"{module.parameters:,}",
            f"{module.delta_rms:.2e}",
        )
    console.print(table)
    console.print(f"{len(report.modules)} modules, {report.parameters:,} parameters")
