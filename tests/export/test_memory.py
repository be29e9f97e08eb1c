"""Memory stays near one tensor, however large the model is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from exported import write_adapter

from small_omnigen import build_small_omnigen

#: Prints how many bytes the peak of memory grew while exporting.
_SCRIPT = """
import sys
from pathlib import Path
from diffusers import OmniGenTransformer2DModel  # part of the program, and large
from omnigen_pipe.export.exporting import run
from omnigen_pipe.model_files import Model
from omnigen_pipe.progress import Progress
def peak():
    # Of this program alone: getrusage counts what the process was before it, too.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
adapter, out, model, layout, dtype = sys.argv[1:]
run(Path(adapter), Path(out), Progress(True), base=Model(model, Path()), layout=layout,
    dtype=dtype or None)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the peak")
@pytest.mark.parametrize("layout", ["diffusers", "omnigen"])
def test_the_peak_is_a_few_tensors(tmp_path: Path, layout: str) -> None:
    """A model of half a GB, of which the largest tensor has 151 MB and the next 17 MB."""
    model = build_small_omnigen(tmp_path / "model", hidden_size=1024, num_layers=8)
    adapter = write_adapter(model, tmp_path / "a.safetensors")
    weights = next((model / "transformer").glob("*.safetensors")).stat().st_size
    assert weights > 480 * 10**6
    grown = {}
    for dtype in ("", "bf16"):
        command = [sys.executable, "-c", _SCRIPT, str(adapter), str(tmp_path / f"out-{dtype}")]
        done = subprocess.run(
            [*command, str(model), layout, dtype], capture_output=True, text=True, check=True
        )
        grown[dtype] = int(done.stdout)
    largest = 192 * 192 * 1024 * 4
    # As it is stored, as it is rounded, and what merging a layer takes.
    assert max(grown.values()) < 2.3 * largest < 0.7 * weights
