"""The rows of the stages that prepare data, and of what they plan."""

from __future__ import annotations

import itertools
import json
import math
import resource
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import folders
import scale
from table import SHARED, Bench, Goal, Line, Row, Skip, child, duration, elapsed, in_turn

from manifests.query import query
from omnigen_pipe.model_files import EMBEDDED_FOLDER
from omnigen_pipe.prompts.template import render
from omnigen_pipe.workspace import Workspace

_CLI = (sys.executable, "-m", "omnigen_pipe.cli")

#: Width and height of the pictures that discover reads: about 50 kB each.
_SMALL = ((640, 480), (512, 512), (480, 720))

#: Width and height of the pictures that are decoded: 1 to 12 megapixels.
_LARGE = ((1200, 900), (1600, 1200), (2048, 1536), (2592, 1944), (3264, 2448), (4000, 3000))

#: Shards of 100,000 latents: of 1024 x 1024 pixels, some 400 fit into one, and a minute closes it.
_SHARDS = 250

_GROWTH_SIZES = (10_000, 100_000, 1_000_000)
#: Latents of a fragment where growth is measured: a fourth of the most fragments at a million.
_LATENTS_A_FRAGMENT = 4000


def _ours(work: str, *arguments: object) -> Callable[[], float]:
    return lambda: float(child("ours.py", work, *arguments)["seconds"])


def _counting(work: str, root: Path, **counts: int) -> Callable[[], float]:
    """As `_ours`, where these are to be its counts."""

    def run() -> float:
        found = child("ours.py", work, root)
        assert found["counts"] == counts, found
        return float(found["seconds"])

    return run


def _bare(work: str, *arguments: object) -> Callable[[], float]:
    return lambda: float(child("bare.py", work, *arguments)["seconds"])


def _anew(work: Callable[[], float], *paths: Path) -> Callable[[], float]:
    """`work` without what an earlier one left at `paths`."""

    def run() -> float:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        return work()

    return run


def _processor_seconds() -> float:
    """What the processes that ended so far have taken of the processors."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(bench: Bench) -> Iterator[Line]:
    """`--help` against that of a bare Typer app."""
    app = Path(__file__).with_name("bare_app.py")
    ours, bare = in_turn(
        3 * bench.repeats,
        partial(elapsed, *_CLI, "--help"),
        partial(elapsed, sys.executable, str(app), "--help"),
    )
    yield Line("start", START.goal, ours=ours, bare=bare)


def encode_nothing(bench: Bench) -> Iterator[Line]:
    """encode-vae as a command, with every latent there."""
    number = bench.amount(100_000)
    workspace = scale.build_images(bench.folder, EMBEDDED_FOLDER, number)
    child("ours.py", "bucket", bench.folder)
    scale.build_logs(workspace, _SHARDS)
    command = (*_CLI, "encode-vae", "--quiet", "-w", str(bench.folder))
    before = _processor_seconds()
    (ours,) = in_turn(bench.repeats, partial(elapsed, *command))
    busy = (_processor_seconds() - before) / bench.repeats
    found = child("ours.py", "plan_encoding", bench.folder)
    failed = "torch was imported" if found["torch"] else ""
    if found["counts"]["already there"] != number:
        failed = f"{found['counts']['already there']:,} latents were found"
    yield Line(
        "encode-vae, nothing to do",
        ENCODE_NOTHING.goal,
        amount=number,
        ours=ours,
        failed=failed,
        note=f"{number:,} latents in {_SHARDS} shards, with the start of the command; "
        f"{busy:.2f} s of processor time",
        details={"processor_seconds": busy},
    )


def discover_cold(bench: Bench) -> Iterator[Line]:
    """discover of files that it has never seen."""
    number = bench.amount(20_000)
    nbytes = folders.jpegs(bench.folder / "photos", number, _SMALL)
    folders.workspace(bench.folder)
    ours, bare = in_turn(
        bench.repeats,
        _anew(_ours("discover", bench.folder), bench.folder / "manifests"),
        _bare("read_hash_header", bench.folder / "photos"),
    )
    yield Line(
        "discover, cold",
        DISCOVER_COLD.goal,
        "files",
        number,
        ours,
        bare,
        note=f"{number:,} JPEGs of {nbytes / number / 1000:.0f} kB, in the system's cache",
    )


def discover_unchanged(bench: Bench) -> Iterator[Line]:
    """discover of files that it has read before."""
    number = bench.amount(100_000)
    folders.empty_files(bench.folder / "photos", number)
    folders.know_all(folders.workspace(bench.folder))
    ours, bare = in_turn(
        2 * bench.repeats - 1,
        _ours("discover", bench.folder),
        _bare("walk", bench.folder / "photos"),
    )
    found = child("ours.py", "discover", bench.folder)["counts"]
    failed = "" if (found["ok"], found["files opened"]) == (number, 0) else f"found {found}"
    yield Line(
        "discover, nothing changed", DISCOVER_UNCHANGED.goal, "files", number, ours, bare,
        failed=failed, note="captions are the files' names",
    )  # fmt: skip


def bucket(bench: Bench) -> Iterator[Line]:
    """bucket against copying its input."""
    number = bench.amount(1_000_000)
    workspace = scale.build_images(bench.folder, EMBEDDED_FOLDER, number)
    copy = bench.folder / "copy.parquet"
    ours, bare = in_turn(
        bench.repeats,
        _anew(_ours("bucket", bench.folder), workspace.samples.path),
        _anew(_bare("copy_parquet", workspace.images.path, copy), copy),
    )
    yield Line("bucket", BUCKET.goal, "images", number, ours, bare)


def tokenize(bench: Bench) -> Iterator[Line]:
    """tokenize, with the real tokenizer, against its library."""
    number = bench.amount(100_000)
    tokenizer = SHARED / "tokenizer" / "phi-3-mini"
    if not tokenizer.is_dir():
        raise Skip(f"the Phi-3-mini tokenizer is not at {tokenizer}")
    model = bench.folder / "model"
    for part in ("vae", "transformer", "scheduler"):
        (model / part).mkdir(parents=True)
    shutil.copytree(tokenizer, model / "tokenizer")
    workspace = scale.build_images(bench.folder / "w", model, number)
    child("ours.py", "bucket", workspace.root)
    rows = query("SELECT captions[1] AS text FROM samples", samples=workspace.samples.source())
    texts = bench.folder / "texts.json"
    texts.write_text(json.dumps([render(text) for text in rows["text"].to_pylist()]))
    ours, bare = in_turn(
        bench.repeats,
        _anew(_ours("tokenize", workspace.root), workspace.prompts.folder),
        _bare("encode_batch", model / "tokenizer" / "tokenizer.json", texts),
    )
    yield Line("tokenize", TOKENIZE.goal, "captions", number, ours, bare)


def decode_bound(bench: Bench) -> Iterator[Line]:
    """encode-vae where decoding is the work: full and reduced decoding.

    100 images rather than 2,000: these would take half of the time that all rows may.
    """
    number = bench.amount(100)
    nbytes = folders.jpegs(bench.folder / "photos", number, _LARGE, kinds=len(_LARGE))
    vae = folders.vae(bench.folder / "vae", (4, 4, 4, 4), 0, attention=False)
    full, reduced = bench.folder / "full", bench.folder / "reduced"
    for root, decode in ((full, "full"), (reduced, "reduced")):
        options = ("resolution = 512", "[pixels]", f'decode = "{decode}"')
        _prepare(root, bench.folder / "photos", vae, *options)
    jobs = _jobs(full, bench.folder / "jobs.json")
    works = [
        _anew(_ours("encode", root), root / "latents", root / "manifests" / "latents")
        for root in (full, reduced)
    ]
    repeats = max(1, bench.repeats - 1)
    bare_works = [_bare("decode_resize", jobs, decode) for decode in ("full", "reduced")]
    ours, fewer, bare, bare_fewer = in_turn(repeats, *works, *bare_works)
    # On a CPU even a tiny VAE works on the cores that decode.
    batch, bucket = Workspace.open(full).config.vae.vae_batch_size, _usual_bucket(full)
    beside = child("bare.py", "vae_loop", vae, number, bucket, batch)["seconds"]

    def with_vae(mine: tuple[float, ...], plain: tuple[float, ...]) -> str:
        both = Line("", DECODE_BOUND.goal, ours=mine, bare=tuple(each + beside for each in plain))
        return f"against decoding and then the bare VAE on the same cores {both.value:.2f}"

    loss = child("ours.py", "loss_of_reduction", full, 2 * len(_LARGE))
    gained = Line("", DECODE_BOUND.goal, ours=fewer, bare=ours).value
    made = f"{number:,} JPEGs of {nbytes / number / 2**20:.1f} MiB and 1 to 12 megapixels to 512 px"
    made += f"; {with_vae(ours, bare)}"
    yield Line(
        "encode-vae, decode-bound", DECODE_BOUND.goal, "images", number, ours, bare, note=made
    )
    yield Line(
        'encode-vae, decode = "reduced"',
        DECODE_BOUND.goal,
        "images",
        number,
        fewer,
        bare_fewer,
        note=f"the bare loop decodes reduced, too; {with_vae(fewer, bare_fewer)}; "
        f"{gained:.1f} times our rate with full decoding, {loss['median']:.0f} dB from it in the "
        f"median, {loss['least']:.0f} dB at least",
        details={"decibels": loss},
    )


def _prepare(root: Path, photos: Path, vae: Path, *options: str) -> Workspace:
    """A workspace over `photos`, with samples."""
    root.mkdir()
    (root / "photos").symlink_to(photos)
    workspace = folders.workspace(root, *options, vae=vae)
    child("ours.py", "discover", root)
    child("ours.py", "bucket", root)
    return workspace


def _usual_bucket(root: Path) -> str:
    """The bucket that most samples have."""
    (found,) = query(
        "SELECT mode(bucket) AS bucket FROM samples WHERE status = 'ok'",
        samples=Workspace.open(root).samples.source(),
    )["bucket"].to_pylist()
    return str(found)


def _jobs(root: Path, path: Path) -> Path:
    """The samples' files, sizes and boxes, for the bare loop."""
    workspace = Workspace.open(root)
    rows = query(
        "SELECT * FROM samples WHERE status = 'ok' ORDER BY bucket, pixels_key",
        samples=workspace.samples.source(),
    ).to_pylist()
    jobs = []
    for row in rows:
        width, height = (int(side) for side in row["bucket"].split("x"))
        left, top = row["crop_left"], row["crop_top"]
        size = (row["resize_width"], row["resize_height"])
        file = str(root / "photos" / row["path"])
        jobs.append((file, size, (left, top, left + width, top + height)))
    path.write_text(json.dumps(jobs), encoding="utf-8")
    return path


def vae_bound(bench: Bench) -> Iterator[Line]:
    """encode-vae where the VAE is the work: on a CPU it takes seconds per image."""
    number, side = bench.amount(2, least=2), 256
    folders.jpegs(bench.folder / "photos", number, [(640, 640)])
    vae = folders.vae(bench.folder / "vae", (128, 256, 512, 512), 2, attention=True)
    root = bench.folder / "w"
    _prepare(
        root, bench.folder / "photos", vae, f"resolution = {side}", "[vae]", "vae_batch_size = 2"
    )
    ours, bare = in_turn(
        bench.repeats,
        _anew(_ours("encode", root), root / "latents", root / "manifests" / "latents"),
        _bare("vae_loop", vae, number, f"{side}x{side}", 2),
    )
    yield Line(
        "encode-vae, VAE-bound", VAE_BOUND.goal, "images", number, ours, bare,
        note=f"SDXL's VAE with random weights, {side} px, a batch of 2 in each turn",
    )  # fmt: skip


def growth(bench: Bench) -> Iterator[Line]:
    """How the time of planning grows with the number of images."""
    sizes = sorted({bench.amount(size, least=100) for size in _GROWTH_SIZES})
    took: dict[str, dict[int, tuple[float, ...]]] = {}
    for size in sizes:
        repeats = bench.repeats if size < 100_000 else 1
        for step, work in _steps(bench.folder / str(size), size):
            (took.setdefault(step, {})[size],) = in_turn(repeats, work)
        shutil.rmtree(bench.folder / str(size))
    for step, by_size in took.items():
        middle = {size: statistics.median(seconds) for size, seconds in by_size.items()}
        exponents = [
            math.log(middle[more] / middle[fewer]) / math.log(more / fewer)
            for fewer, more in itertools.pairwise(sizes)
        ]
        listed = ", ".join(f"{size:,}: {duration(took)}" for size, took in middle.items())
        yield Line(
            f"growth of {step}",
            GROWTH.goal,
            amount=sizes[-1],
            ours=by_size[sizes[-1]],
            exponent=exponents[-1],
            note=listed,
            details={"seconds": middle, "exponents": exponents},
        )


def _steps(root: Path, size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is timed at one size, each when what it needs is built."""
    walked = root / "walked"
    folders.empty_files(walked / "photos", size)
    folders.know_all(folders.workspace(walked))
    yield "discover, nothing changed", _ours("discover", walked)
    yield "status", _ours("status", walked, "full")
    planned = root / "planned"
    workspace = scale.build_images(planned, EMBEDDED_FOLDER, size)
    yield "bucket", _anew(_ours("bucket", planned), workspace.samples.path)
    yield "encode-vae's plan, all missing", _counting("plan_missing", planned, missing=size)
    # In proportion: as many at every size would hide what grows behind what does not.
    scale.build_logs(workspace, max(1, size // _LATENTS_A_FRAGMENT))
    yield "status --quick", _ours("status", planned, "quick")
    yield "encode-vae's plan", _ours("plan_encoding", planned)
    yield "an epoch's order", lambda: float(child("ours.py", "plan_epoch", size)["seconds"])


START = Row("start", "start", Goal(1.5, "times"), start)
ENCODE_NOTHING = Row(
    "encode-nothing", "encode-vae, nothing to do", Goal(2, "seconds"), encode_nothing
)
DISCOVER_COLD = Row("discover-cold", "discover, cold", Goal(0.85, "rate"), discover_cold)
DISCOVER_UNCHANGED = Row(
    "discover-unchanged", "discover, nothing changed", Goal(2, "times"), discover_unchanged
)
BUCKET = Row("bucket", "bucket", Goal(6, "times"), bucket)
TOKENIZE = Row("tokenize", "tokenize", Goal(0.75, "rate"), tokenize)
DECODE_BOUND = Row("decode-bound", "encode-vae, decode-bound", Goal(0.9, "rate"), decode_bound)
VAE_BOUND = Row("vae-bound", "encode-vae, VAE-bound", Goal(1.05, "times"), vae_bound)
GROWTH = Row("growth", "growth", Goal(1.1, "exponent"), growth)

ROWS = (
    START,
    ENCODE_NOTHING,
    DISCOVER_COLD,
    DISCOVER_UNCHANGED,
    BUCKET,
    TOKENIZE,
    DECODE_BOUND,
    VAE_BOUND,
    GROWTH,
)
