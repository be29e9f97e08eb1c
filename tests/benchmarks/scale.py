"""How long, and in how much memory, the commands plan their work on many images.

    python tests/benchmarks/scale.py
    python tests/benchmarks/scale.py --images 100000 --folder /scratch --json

Builds workspaces of 10,000, 100,000 and `--images` images that exist as rows only, without a
pixel, and runs in each, as processes of their own: bucket twice, encode-vae with every latent
there, the question which latents are missing when a tenth is, tokenize with every prompt there,
and `status --quick` where that command exists. The growth is the exponent between the last two
sizes: 1 means that ten times the images take ten times as long. A million images need about 1 GB
of disk in `--folder`, which is cleaned up. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from manifests.query import query  # noqa: E402
from manifests.schema import IMAGES, LATENTS, PROMPTS, Manifest  # noqa: E402
from omnigen_pipe.images.catalogue import discovered_settings, options_fingerprint  # noqa: E402
from omnigen_pipe.latents.vae import inputs_key, vae_inputs  # noqa: E402
from omnigen_pipe.model_files import model_part  # noqa: E402
from omnigen_pipe.prompts import tokenizer as tokenizers  # noqa: E402
from omnigen_pipe.prompts.library import prompts_besides_captions  # noqa: E402
from omnigen_pipe.prompts.template import prompt_key  # noqa: E402
from omnigen_pipe.settings import as_text  # noqa: E402
from omnigen_pipe.workspace import Workspace  # noqa: E402
from small_omnigen import build_small_omnigen  # noqa: E402

SIZES = (10_000, 100_000)

#: Fragments per log: as many as there may be before they are merged.
FRAGMENTS = 1000

#: Bytes of a latent of 1024 x 1024 pixels in float16.
LATENT_NBYTES = 8 * 128 * 128 * 2
PROMPT_LENGTH = 40

_CLI = ("-m", "omnigen_pipe.cli")

#: Starts the command from a small process: a child's peak counts from its parent's size, and this
#: script's is that of the workspaces it builds. The system counts in KiB, macOS in bytes.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.monotonic()
with open(sys.argv[1], "wb") as output:
    process = subprocess.Popen(sys.argv[2:], stdout=output)
    _, status, usage = os.wait4(process.pid, 0)
unit = 1024**2 if sys.platform == "darwin" else 1024
print(json.dumps({
    "seconds": round(time.monotonic() - started, 2),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_mib": round(usage.ru_maxrss / unit),
}))
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


def build_images(root: Path, model: Path, number: int) -> Workspace:
    """A workspace whose images.parquet names `number` images that are not there."""
    (root / "photos").mkdir(parents=True)
    (root / "omnigen-pipe.toml").write_text(
        f"[model]\npretrained_model_name_or_path = {json.dumps(str(model))}\n"
        '[[dataset]]\nid = "photos"\ninstance_data_dir = "photos"\nupscale = true\n'
    )
    random = np.random.default_rng(0)
    digests = random.bytes(16 * number).hex()
    words = "a red blue house under the old tree with many small birds and clouds in the evening"
    drawn = random.choice(words.split(), (number, 12))
    columns = {
        "dataset": ["photos"] * number,
        "path": [f"{i // 1000:04d}/{i:07d}.jpg" for i in range(number)],
        "size": random.integers(10**5, 10**6, number),
        "mtime_ns": np.full(number, 1_700_000_000 * 10**9),
        "content_hash": [digests[32 * i : 32 * (i + 1)] for i in range(number)],
        "format": ["JPEG"] * number,
        "width": random.integers(500, 4000, number),
        "height": random.integers(500, 4000, number),
        "mode": ["RGB"] * number,
        "frames": np.ones(number, int),
        "captions": [[f"{' '.join(row)} {i}"] for i, row in enumerate(drawn)],
        "status": ["ok"] * number,
    }
    workspace = Workspace.open(root)
    datasets = workspace.config.datasets
    workspace.images.replace(
        _table(IMAGES, number, columns),
        fingerprint=options_fingerprint(datasets),
        settings=as_text(discovered_settings(datasets)),
    )
    return workspace


def build_logs(workspace: Workspace, fragments: int | None = None) -> None:
    """Logs with every latent and prompt that the samples want, and shards that are all holes.

    Each has so many `fragments`, by default `FRAGMENTS`.
    """
    inputs = vae_inputs(workspace, model_part(workspace, "vae"))
    vae_key, tokenizer = inputs_key(inputs), tokenizers.load_configured(workspace)
    rows = query(
        """
        SELECT pixels_key, bucket, prompt_keys[1] AS prompt_key, captions[1] AS text
        FROM samples ORDER BY bucket, pixels_key
        """,
        samples=workspace.samples.source(),
    )
    about = {"inputs": as_text({vae_key: inputs})}
    bounds = np.linspace(0, rows.num_rows, min(fragments or FRAGMENTS, rows.num_rows) + 1).astype(
        int
    )
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        part, length = rows.slice(start, end - start), int(end - start)
        shard = f"latents/{part['bucket'][0].as_py()}/{number:032x}.tar"
        path = workspace.root / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, length * LATENT_NBYTES)
        latents = {
            "pixels_key": part["pixels_key"],
            "vae_key": [vae_key] * length,
            "bucket": part["bucket"],
            "shard": [shard] * length,
            "offset": np.arange(length) * LATENT_NBYTES,
            "nbytes": np.full(length, LATENT_NBYTES),
            "checksum": np.arange(start, end),
            "shape": [[8, 128, 128]] * length,
            "dtype": ["float16"] * length,
            "shard_nbytes": np.full(length, length * LATENT_NBYTES),
            "shard_checksum": np.full(length, number),
            "written_at_ns": np.ones(length, int),
            "status": ["ok"] * length,
        }
        workspace.latents.append(_table(LATENTS, length, latents), f"{number:032x}", **about)
        texts = part["text"].to_pylist()
        keys = part["prompt_key"].to_pylist()
        if number == 0:
            others = prompts_besides_captions(workspace)
            texts, keys = texts + others, keys + [prompt_key(text) for text in others]
        prompts = {
            "prompt_key": keys,
            "tokenizer_key": [tokenizer.key] * len(keys),
            "text": texts,
            "input_ids": [[1] * PROMPT_LENGTH] * len(keys),
            "length": np.full(len(keys), PROMPT_LENGTH),
            "written_at_ns": np.ones(len(keys), int),
            "status": ["ok"] * len(keys),
        }
        workspace.prompts.append(_table(PROMPTS, len(keys), prompts))


def _table(manifest: Manifest, number: int, columns: dict[str, Any]) -> pa.Table:
    """Rows of `manifest`; columns that are not given are null."""
    return pa.table(
        [
            columns[field.name].cast(field.type)
            if isinstance(columns.get(field.name), pa.ChunkedArray)
            else pa.array(columns.get(field.name, [None] * number), field.type)
            for field in manifest.schema
        ],
        schema=manifest.schema,
    )


def run(*arguments: str) -> dict[str, Any]:
    """Run Python with `arguments`: what it took, and the `counts` that it printed as JSON.

    `seconds` on the clock, `cpu_seconds` over all threads, and `peak_mib` of memory. Raises
    `subprocess.CalledProcessError` where it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        command = [sys.executable, "-I", "-c", _LAUNCHER, str(output), sys.executable, *arguments]
        launched = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
        took: dict[str, Any] = json.loads(launched.stdout)
        printed = json.loads(output.read_text())
    took["counts"] = printed.get("counts", {}) if isinstance(printed, dict) else {}
    return took


def measure(root: Path, model: Path, number: int) -> dict[str, dict[str, Any]]:
    """What each step took in a new workspace `root` of `number` images."""
    workspace = build_images(root, model, number)
    options = ("-w", str(root), "--quiet", "--json")
    steps = {"bucket, the first time": run(*_CLI, "bucket", *options)}
    steps["bucket, unchanged"] = run(*_CLI, "bucket", *options)
    build_logs(workspace)
    steps["encode-vae, all there"] = run(*_CLI, "encode-vae", *options)
    for path in workspace.latents.fragments()[::10]:
        path.unlink()
    plan = str(Path(__file__).with_name("ours.py"))
    steps["latents, a tenth missing"] = run(plan, "plan_missing", str(root))
    steps["tokenize, all there"] = run(*_CLI, "tokenize", *options)
    if _has_status():
        steps["status --quick"] = run(*_CLI, "status", "--quick", "-w", str(root), "--json")
    return steps


def _has_status() -> bool:
    asked = [sys.executable, *_CLI, "status", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(asked, capture_output=True, env=environment).returncode == 0


def growth(results: dict[int, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """For each step the exponent of its time between the last two sizes; none for one size."""
    if len(results) < 2:
        return {}
    fewer, more = sorted(results)[-2:]
    times = math.log(more / fewer)
    return {
        step: round(math.log(took["seconds"] / results[fewer][step]["seconds"]) / times, 2)
        for step, took in results[more].items()
    }


def show(results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Print a table: seconds and peak memory of each step for each size, and the growth."""
    exponents = growth(results)
    sizes = sorted(results)
    print(f"{'':26}" + "".join(f"{f'{size:,} images':>22}" for size in sizes) + f"{'growth':>9}")
    for step in results[sizes[-1]]:
        took = [results[size][step] for size in sizes]
        cells = (f"{one['seconds']:.2f} s {one['peak_mib']:5} MiB" for one in took)
        line = f"{step:26}" + "".join(f"{cell:>22}" for cell in cells)
        print(line + (f"{exponents[step]:9.2f}" if exponents else ""))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000, help="the largest size")
    parser.add_argument("--folder", type=Path, help="where to build; default: the system's")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    chosen = parser.parse_args(arguments)
    results = {}
    with tempfile.TemporaryDirectory(prefix="scale-", dir=chosen.folder) as folder:
        model = build_small_omnigen(Path(folder) / "model")
        for size in sorted({*(s for s in SIZES if s < chosen.images), chosen.images}):
            results[size] = measure(Path(folder) / str(size), model, size)
    if chosen.json:
        machine = {"cores": os.cpu_count(), "platform": platform.platform()}
        print(json.dumps({"machine": machine, "sizes": results, "growth": growth(results)}))
    else:
        show(results)


if __name__ == "__main__":
    main()
