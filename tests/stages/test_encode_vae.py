"""encode-vae: every wanted latent once, whatever happened before; nothing done twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import webdataset
from blake3 import blake3
from PIL import Image, ImageFile, ImageOps

import stages.bucket
import stages.discover
import stages.encode_vae
from manifests.errors import PipeError, UsageError
from manifests.schema import IMAGES
from manifests.views import current_latents
from omnigen_pipe.images.catalogue import discovered_settings
from omnigen_pipe.latents import encoder
from omnigen_pipe.latents.shards import ShardError
from omnigen_pipe.latents.share import Share
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

QUIET = Progress(quiet=True)


def make_workspace(root: Path, model: Path, **options: Any) -> Workspace:
    """A workspace over `root`/photos at 64 px; `options` go to [vae], `more` is TOML besides."""
    root.mkdir(exist_ok=True)
    (root / "photos").mkdir(exist_ok=True)
    more = options.pop("more", "")
    vae = "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
    (root / "omnigen-pipe.toml").write_text(
        f'[model]\npretrained_model_name_or_path = "{model}"\n[vae]\n{vae}'
        f"[defaults]\nresolution = 64\naspect_bucket_alignment = 16\n{more}\n"
        '[[dataset]]\nid = "photos"\ninstance_data_dir = "photos"\n'
    )
    return Workspace.open(root)


def draw(place: Workspace, *numbers: int) -> None:
    """Pictures of noise in two shapes, as photos/N.png."""
    for number in numbers:
        size = (96, 80) if number % 2 else (80, 112)
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(place.root / "photos" / f"{number}.png")


def list_samples(place: Workspace, sizes: dict[str, tuple[int, int]] | None = None) -> None:
    """Stand in for discover (every file as it is now; `sizes` for unreadable ones), then bucket."""
    rows = []
    for path in sorted((place.root / "photos").iterdir()):
        if sizes is not None and path.name in sizes:
            width, height = sizes[path.name]
        else:
            with Image.open(path) as image:
                width, height = ImageOps.exif_transpose(image).size
        rows.append(
            {
                "dataset": "photos",
                "path": path.name,
                "content_hash": blake3(path.read_bytes()).hexdigest()[:32],
                "width": width,
                "height": height,
                "captions": [path.stem],
                "status": "ok",
            }
        )
    place.images.replace(
        pa.Table.from_pylist(rows, schema=IMAGES.schema),
        settings=as_text(discovered_settings(place.config.datasets)),
    )
    stages.bucket.run(place, QUIET)


def run(place: Workspace) -> Summary:
    return stages.encode_vae.run(place, QUIET, device="cpu")


def ok_rows(place: Workspace) -> dict[str, dict[str, Any]]:
    """The latents that count, by pixels_key."""
    view = current_latents(place.latents.read(), place.root).to_pylist()
    return {row["pixels_key"]: row for row in view if row["status"] == "ok"}


def wanted_keys(place: Workspace) -> set[str]:
    return {r["pixels_key"] for r in place.samples.read().to_pylist() if r["status"] == "ok"}


@pytest.fixture
def place(tmp_path: Path, small_omnigen: Path) -> Workspace:
    workspace = make_workspace(tmp_path / "w", small_omnigen, latent_dtype="fp32")
    draw(workspace, *range(7))
    list_samples(workspace)
    return workspace


def test_shards_read_by_webdataset_equal_diffusers(place: Workspace, small_omnigen: Path) -> None:
    """Images cropped with Pillow alone, encoded by diffusers alone."""
    import torch
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    summary = run(place)
    assert summary.counts["encoded"] == summary.counts["wanted"] == 7
    assert summary.changed
    found = {}
    for tar in sorted(place.root.glob("latents/*/*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            found[sample["__key__"]] = (sample["moments.npy"], sample["json"], tar.parent.name)
    vae = AutoencoderKL.from_pretrained(small_omnigen / "vae")
    samples = place.samples.read().to_pylist()
    assert len({sample["bucket"] for sample in samples}) == 2
    for sample in samples:
        width, height = (int(side) for side in sample["bucket"].split("x"))
        left, top = sample["crop_left"], sample["crop_top"]
        with Image.open(place.root / "photos" / sample["path"]) as image:
            size = (sample["resize_width"], sample["resize_height"])
            cropped = image.resize(size, Image.Resampling.LANCZOS).crop(
                (left, top, left + width, top + height)
            )
        with torch.no_grad():
            posterior = vae.encode(VaeImageProcessor().preprocess(cropped)).latent_dist
        expected = torch.cat([posterior.mean, posterior.logvar], 1)[0].numpy()
        moments, facts, folder = found.pop(sample["pixels_key"])
        near = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=near)
        assert facts == {
            "pixels_key": sample["pixels_key"],
            "vae_key": summary.details["vae_key"],
            "content_hash": sample["content_hash"],
            "bucket": sample["bucket"],
            "resize": list(size),
            "crop": [left, top],
        }
        assert folder == sample["bucket"]
    assert found == {}


def test_a_second_run_encodes_nothing_without_torch(place: Workspace) -> None:
    run(place)
    before = sorted(str(path) for path in place.root.rglob("*"))
    script = (
        "import sys\n"
        "from omnigen_pipe.cli import main\n"
        f"sys.argv = ['omnigen-pipe', 'encode-vae', '-w', {str(place.root)!r}, '--json']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    summary = json.loads(done.stdout)
    assert summary["changed"] is False
    assert (summary["counts"]["already there"], summary["counts"]["encoded"]) == (7, 0)
    after = sorted(str(path) for path in place.root.rglob("*"))
    assert [path for path in after if not path.endswith("weights.json")] == [
        path for path in before if not path.endswith("weights.json")
    ]


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [(None, "PASSIVE"), pytest.param("ACTIVE", "ACTIVE", marks=pytest.mark.slow)],
)
def test_torch_is_loaded_when_threads_were_told_not_to_spin(
    place: Workspace, chosen: str | None, seen: str
) -> None:
    """Later would be too late: OpenMP looks at it once. A user's own choice stands."""
    script = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n            print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from omnigen_pipe.cli import main\n"
        f"sys.argv = ['omnigen-pipe', 'encode-vae', '-w', {str(place.root)!r}, '-q',"
        " '--device', 'cpu']\n"
        "main()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[0] == seen


def test_only_what_is_missing_is_encoded(place: Workspace) -> None:
    run(place)
    first = ok_rows(place)
    draw(place, 7)
    list_samples(place)
    summary = run(place)
    assert (summary.counts["already there"], summary.counts["encoded"]) == (7, 1)
    assert ok_rows(place).keys() == wanted_keys(place)
    assert {key: ok_rows(place)[key] for key in first} == first


def test_copies_and_renames_cost_nothing(place: Workspace) -> None:
    run(place)
    photos = place.root / "photos"
    shutil.copy(photos / "1.png", photos / "copy.png")
    (photos / "2.png").rename(photos / "renamed.png")
    list_samples(place)
    summary = run(place)
    assert summary.counts["wanted"] == summary.counts["already there"] == 7
    assert not summary.changed


def test_equal_images_are_encoded_once(tmp_path: Path, small_omnigen: Path) -> None:
    place = make_workspace(tmp_path / "w", small_omnigen)
    draw(place, 1)
    for name in ("a.png", "b.png"):
        shutil.copy(place.root / "photos" / "1.png", place.root / "photos" / name)
    list_samples(place)
    summary = run(place)
    assert (summary.counts["wanted"], summary.counts["encoded"]) == (1, 1)


def test_a_lost_shard_is_encoded_again(place: Workspace) -> None:
    run(place)
    lost = sorted(place.root.glob("latents/*/*.tar"))[0]
    held = sum(row["shard"].endswith(lost.name) for row in ok_rows(place).values())
    lost.unlink()
    summary = run(place)
    assert summary.counts["encoded"] == held > 0
    assert ok_rows(place).keys() == wanted_keys(place)


@pytest.mark.parametrize("left", [0, 1000])
def test_a_shard_cut_short_is_encoded_again(place: Workspace, left: int) -> None:
    run(place)
    cut = sorted(place.root.glob("latents/*/*.tar"))[0]
    held = sum(row["shard"].endswith(cut.name) for row in ok_rows(place).values())
    os.truncate(cut, left)
    assert run(place).counts["encoded"] == held > 0
    assert ok_rows(place).keys() == wanted_keys(place)
    assert run(place).counts["encoded"] == 0


def test_another_vae_or_precision_is_encoded_anew(place: Workspace, small_omnigen: Path) -> None:
    run(place)
    other = make_workspace(place.root, small_omnigen, latent_dtype="fp16")
    assert run(other).counts["encoded"] == 7
    assert run(other).counts["encoded"] == 0
    assert run(place).counts["encoded"] == 0


def test_equal_content_and_batches_give_equal_bytes(tmp_path: Path, small_omnigen: Path) -> None:
    contents = []
    for name in ("one", "two"):
        place = make_workspace(tmp_path / name, small_omnigen, vae_batch_size=3)
        draw(place, *range(5))
        list_samples(place)
        run(place)
        tars = place.root.glob("latents/*/*.tar")
        contents.append(sorted((path.parent.name, path.read_bytes()) for path in tars))
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


def test_what_cannot_be_decoded_fails_alone_and_is_remembered(place: Workspace) -> None:
    noise = np.random.default_rng(99).integers(0, 256, (80, 96, 3), np.uint8)
    broken = place.root / "photos" / "broken.jpg"
    Image.fromarray(noise).save(broken, "JPEG")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    list_samples(place, {"broken.jpg": (96, 80)})
    summary = run(place)
    assert (summary.counts["encoded"], summary.counts["failed"]) == (7, 1)
    assert summary.left_out == {"cannot be decoded": 1}
    assert not summary.failed
    assert any("photos: broken.jpg: cannot be decoded" in note for note in summary.notes)
    again = run(place)
    assert not again.changed
    assert (again.counts["encoded"], again.counts["failed"]) == (0, 1)
    assert again.left_out == summary.left_out
    assert again.details["failed_files"] == summary.details["failed_files"]
    assert any("earlier run" in note for note in again.notes)
    Image.fromarray(noise).save(broken, "JPEG")
    list_samples(place)
    mended = run(place)
    assert (mended.counts["encoded"], mended.counts["failed"]) == (1, 0)


def test_files_changed_since_discover_are_named_and_nothing_else_is_lost(place: Workspace) -> None:
    photos = place.root / "photos"
    (photos / "2.png").unlink()
    Image.new("RGB", (96, 80)).save(photos / "3.png")
    summary = run(place)
    assert summary.failed
    assert summary.counts["changed since discover"] == 2
    assert summary.counts["encoded"] == 5
    (note,) = [note for note in summary.notes if "omnigen-pipe discover" in note]
    assert "2.png: No such file" in note
    assert "3.png: it has changed" in note
    assert place.latents.read().num_rows == 5
    list_samples(place)
    mended = run(place)
    assert not mended.failed
    assert (mended.counts["already there"], mended.counts["encoded"]) == (5, 1)


def test_too_little_memory_for_an_image_is_said_and_nothing_else_is_lost(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoder.read_pixels
    huge = (place.root / "photos" / "2.png").read_bytes()

    def short_of_memory(data: bytes, *arguments: Any) -> np.ndarray:
        if data == huge:
            raise MemoryError
        return real(data, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "read_pixels", short_of_memory)
        summary = run(place)
    assert summary.failed
    assert (summary.counts["encoded"], summary.counts["not read"]) == (6, 1)
    (note,) = [note for note in summary.notes if "want of memory" in note]
    assert "photos: 2.png: not read this time: too little memory; lower decode_workers" in note
    assert len(summary.details["unread_files"]) == 1
    mended = run(place)
    assert not mended.failed
    assert (mended.counts["encoded"], mended.counts["failed"]) == (1, 0)


def test_a_file_wanted_for_two_latents_is_named_once(place: Workspace) -> None:
    place = at_two_resolutions(place)
    photos = place.root / "photos"
    (photos / "2.png").unlink()
    Image.new("RGB", (96, 80)).save(photos / "3.png")
    summary = run(place)
    assert (summary.counts["wanted"], summary.counts["changed since discover"]) == (14, 4)
    assert sorted(summary.details["changed_files"]) == [
        f"{photos}/2.png: No such file or directory",
        f"{photos}/3.png: it has changed",
    ]
    (note,) = [note for note in summary.notes if "omnigen-pipe discover" in note]
    assert note.startswith("2 files were no longer what discover saw.")
    assert note.count("2.png") == 1


def at_two_resolutions(place: Workspace, larger: int = 80, more: str = "") -> Workspace:
    """`place`, its images wanted at 64 px and at `larger` px, discovered and in buckets."""
    toml = place.root / "omnigen-pipe.toml"
    dataset = f'[[dataset]]\nid = "larger"\ninstance_data_dir = "photos"\nresolution = {larger}\n'
    toml.write_text(toml.read_text() + dataset + more)
    place = Workspace.open(place.root)
    stages.discover.run(place, QUIET)
    stages.bucket.run(place, QUIET)
    return place


#: Names of files in the order in which they were opened, while it is a list.
_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(Path(str(arguments[0])).name)


sys.addaudithook(_note_opened)  # there for good, and silent but for the test below


@pytest.mark.parametrize(
    ("decode", "larger", "decodings"),
    # A quarter suffices for 64 and 80 px, but 200 px need all.
    [("full", 80, 1), ("full", 200, 1), ("reduced", 80, 1), ("reduced", 200, 2)],
)
def test_the_same_images_at_two_resolutions_are_read_once_and_decoded_once_for_each_scale(
    tmp_path: Path,
    small_omnigen: Path,
    monkeypatch: pytest.MonkeyPatch,
    decode: str,
    larger: int,
    decodings: int,
) -> None:
    options = {"vae_batch_size": 1, "latent_dtype": "fp32"}
    place = make_workspace(tmp_path / "w", small_omnigen, **options)
    for number in range(6):
        size = (480, 640) if number % 2 else (640, 480)
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(place.root / "photos" / f"{number}.jpg")
    place = at_two_resolutions(place, larger, f'[pixels]\ndecode = "{decode}"\n')
    decoded: list[tuple[int, int]] = []
    prepare = ImageFile.ImageFile.load_prepare

    def spy(image: ImageFile.ImageFile) -> None:
        decoded.append(image.size)
        prepare(image)

    monkeypatch.setattr(f"{__name__}._opened", opened := [])
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load_prepare", spy)
        summary = run(place)
    monkeypatch.setattr(f"{__name__}._opened", None)
    assert summary.counts["encoded"] == summary.counts["wanted"] == 12
    photos = sorted(path.name for path in (place.root / "photos").iterdir())
    assert sorted(name for name in opened if name in photos) == photos
    assert len(decoded) == 6 * decodings
    # No shard is shorter than it must be: there is one for each bucket.
    buckets = {row["bucket"] for row in ok_rows(place).values()}
    assert len(list(place.root.glob("latents/*/*.tar"))) == len(buckets) == 4

    # Each geometry by itself, in a workspace of its own, gives the same bytes.
    found = {key: row["checksum"] for key, row in ok_rows(place).items()}
    assert found.keys() == wanted_keys(place)
    samples = place.samples.read()
    alone: dict[str, int] = {}
    for dataset in ("photos", "larger"):
        other = Workspace.open(shutil.copytree(place.root, tmp_path / dataset))
        shutil.rmtree(other.root / "latents")
        shutil.rmtree(other.root / "manifests" / "latents")
        own = samples.filter(pc.equal(samples["dataset"], dataset))
        monkeypatch.setattr(stages.encode_vae, "current_samples", lambda _, own=own: own)
        assert run(other).counts["encoded"] == 6
        alone |= {key: row["checksum"] for key, row in ok_rows(other).items()}
    assert found == alone


def test_an_image_with_one_of_its_latents_wants_only_the_other(place: Workspace) -> None:
    assert run(place).counts["encoded"] == 7
    first = ok_rows(place)
    place = at_two_resolutions(place)
    summary = run(place)
    assert (summary.counts["already there"], summary.counts["encoded"]) == (7, 7)
    assert {key: ok_rows(place)[key] for key in first} == first
    assert ok_rows(place).keys() == wanted_keys(place)


class Interrupting(Progress):
    """Sends this process a signal as soon as the first images are done."""

    def __init__(self, number: int) -> None:
        super().__init__(quiet=True)
        self.number = number

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Any]:
        sent = False

        def advance(amount: int, detail: str = "") -> None:
            nonlocal sent
            if not sent:
                sent = True
                os.kill(os.getpid(), self.number)

        yield advance


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_publishes_what_is_done(
    tmp_path: Path, small_omnigen: Path, number: signal.Signals
) -> None:
    place = make_workspace(tmp_path / "w", small_omnigen, vae_batch_size=2)
    draw(place, *range(7))
    list_samples(place)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    summary = stages.encode_vae.run(place, Interrupting(number), device="cpu")
    assert summary.signal == number
    assert summary.counts["encoded"] == len(ok_rows(place)) == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = run(place)
    assert rest.signal is None
    assert (rest.counts["already there"], rest.counts["encoded"]) == (2, 5)


def test_a_signal_in_the_last_batch_is_passed_on_too(tmp_path: Path, small_omnigen: Path) -> None:
    """All is encoded, but whatever would come next was asked not to."""
    place = make_workspace(tmp_path / "w", small_omnigen, vae_batch_size=4)
    draw(place, *range(3))
    list_samples(place)
    summary = stages.encode_vae.run(place, Interrupting(signal.SIGTERM), device="cpu")
    assert (summary.signal, summary.counts["encoded"]) == (signal.SIGTERM, 3)


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path, small_omnigen: Path) -> None:
    place = make_workspace(tmp_path / "w", small_omnigen, vae_batch_size=1, shard_seconds=1e-9)
    draw(place, *range(6))
    list_samples(place)
    # Every image is a shard of its own. The fifth publication is the third tar: killed before
    # its fragment appears, and while the next images are being decoded.
    script = (
        "import os, signal, sys\n"
        "import omnigen_pipe.latents.shards as shards, stages.encode_vae\n"
        "from omnigen_pipe.progress import Progress\n"
        "from omnigen_pipe.workspace import Workspace\n"
        "publish, tars = shards.publish, []\n"
        "def killing(staged, final):\n"
        "    tars.append(publish(staged, final))\n"
        "    if len(tars) == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.publish = killing\n"
        "stages.encode_vae.run(Workspace.open(sys.argv[1]), Progress(True), 'cpu')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(place.root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(ok_rows(place)) == 2
    assert len(list(place.root.glob("latents/*/*.tar"))) == 3
    summary = run(place)
    assert (summary.counts["already there"], summary.counts["encoded"]) == (2, 4)
    rows = place.latents.read().to_pylist()
    assert sorted(row["pixels_key"] for row in rows) == sorted(wanted_keys(place))


def test_fragments_say_what_they_were_made_from(place: Workspace) -> None:
    summary = run(place)
    for fragment in place.latents.fragments():
        metadata = pa.parquet.read_schema(fragment).metadata
        ((key, inputs),) = json.loads(metadata[b"omnigen_pipe.inputs"]).items()
        assert key == summary.details["vae_key"]
        assert (inputs["vae_dtype"], inputs["latent_dtype"]) == ("fp32", "fp32")
        assert len(metadata[b"omnigen_pipe.fingerprint"]) == 32


def test_pixel_options_reach_the_latents(tmp_path: Path, small_omnigen: Path) -> None:
    """An image that is all transparent is its background."""
    place = make_workspace(tmp_path / "w", small_omnigen)
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(place.root / "photos" / "clear.png")
    list_samples(place)
    run(place)
    toml = place.root / "omnigen-pipe.toml"
    toml.write_text(toml.read_text() + '[pixels]\nalpha_background = "black"\n')
    place = Workspace.open(place.root)
    with pytest.raises(PipeError, match="made with other settings"):
        run(place)
    stages.bucket.run(place, QUIET)
    assert run(place).counts["encoded"] == 1


def test_what_must_come_first_is_named(tmp_path: Path, small_omnigen: Path) -> None:
    place = make_workspace(tmp_path / "w", small_omnigen)
    with pytest.raises(PipeError, match="run `omnigen-pipe bucket` first"):
        run(place)
    draw(place, 1)
    list_samples(place)
    changed = make_workspace(tmp_path / "w", small_omnigen, more="crop = true")
    with pytest.raises(PipeError, match=r"crop of dataset photos: false → true.*pipe bucket`"):
        run(changed)


def test_no_usable_sample_is_no_error(tmp_path: Path, small_omnigen: Path) -> None:
    place = make_workspace(tmp_path / "w", small_omnigen)
    Image.new("RGB", (20, 20)).save(place.root / "photos" / "small.png")
    list_samples(place)
    summary = run(place)
    assert not summary.changed
    assert summary.counts["wanted"] == 0
    assert any("`omnigen-pipe bucket` says why" in note for note in summary.notes)


def test_a_foreign_manifest_cannot_lead_outside(place: Workspace, tmp_path: Path) -> None:
    run(place)
    stolen = tmp_path / "outside.tar"
    stolen.write_bytes(b"x")
    rows = place.latents.read().to_pylist()
    rows = [row | {"shard": "../outside.tar", "offset": 0} for row in rows]
    place.latents.append(pa.Table.from_pylist(rows, schema=place.latents.manifest.schema))
    with pytest.raises(ShardError, match="does not lie in"):
        run(place)


def test_a_wrong_device_or_vae_is_wrong_usage(place: Workspace, small_omnigen: Path) -> None:
    with pytest.raises(UsageError, match="--device"):
        stages.encode_vae.run(place, QUIET, device="abacus")
    toml = place.root / "omnigen-pipe.toml"
    toml.write_text(toml.read_text().replace(str(small_omnigen), str(place.root / "gone")))
    with pytest.raises(UsageError, match="gone"):
        run(Workspace.open(place.root))


def test_the_documented_ways_to_read_shards_work(
    place: Workspace, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place)
    page = Path(stages.encode_vae.__file__).parents[1] / "docs" / "shards.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(place.root)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("path/to/OmniGen-v1-diffusers", str(small_omnigen)), names)
    assert names["picture"].shape[:2] == (1, 3)
    row = ok_rows(place)[names["row"]["pixels_key"]]
    assert names["moments"].shape == tuple(row["shape"])


def test_a_failure_is_tried_again_only_when_asked(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of Pillow that reads what the earlier one could not."""
    unlucky = blake3((place.root / "photos" / "3.png").read_bytes()).hexdigest()[:32]
    read_pixels = encoder.read_pixels

    def fail(data: bytes, *more: Any) -> np.ndarray:
        if blake3(data).hexdigest()[:32] == unlucky:
            raise encoder.PixelsError("cannot be decoded: not by this version")
        return read_pixels(data, *more)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "read_pixels", fail)
        assert (run(place).counts["encoded"], run(place).counts["failed"]) == (6, 1)
        again = stages.encode_vae.run(place, QUIET, device="cpu", retry_failed=True)
        assert (again.counts["encoded"], again.counts["failed"]) == (0, 1)
        assert again.changed
    skipped = run(place)
    assert (skipped.counts["encoded"], skipped.counts["failed"], skipped.changed) == (0, 1, False)
    assert any("--retry-failed" in note for note in skipped.notes)
    mended = stages.encode_vae.run(place, QUIET, device="cpu", retry_failed=True)
    assert (mended.counts["encoded"], mended.counts["failed"]) == (1, 0)
    assert mended.left_out == {}
    assert ok_rows(place).keys() == wanted_keys(place)
    assert not stages.encode_vae.run(place, QUIET, device="cpu", retry_failed=True).changed


def test_each_worker_takes_its_share_and_says_so(place: Workspace) -> None:
    parts = [
        stages.encode_vae.run(place, QUIET, device="cpu", share=Share(n, 3)) for n in (1, 2, 3)
    ]
    assert sum(part.counts["encoded"] for part in parts) == 7
    for part in parts:
        assert part.counts["wanted"] == part.counts["encoded"]
        assert part.counts["wanted"] + part.counts["other workers'"] == 7
    assert "Worker 3/3" in " ".join(parts[2].notes)
    assert ok_rows(place).keys() == wanted_keys(place)
    assert place.latents.read().num_rows == 7
    assert not run(place).changed


def test_what_is_missing_is_python_s_only_a_few_thousand_rows_at_a_time(tmp_path: Path) -> None:
    """A million latents to encode must not be a million objects."""

    def peak(number: int) -> int:
        missing = pa.table(
            {
                "pixels_key": [f"{n:032x}" for n in range(number)],
                "content_hash": [f"{n:064x}" for n in range(number)],
                "bucket": ["64x64"] * number,
                "files": [[{"dataset": "a", "path": f"{n}.png"}] for n in range(number)],
                **{name: [0] * number for name in ("crop_left", "crop_top")},
                **{name: [64] * number for name in ("resize_width", "resize_height")},
            }
        )
        tracemalloc.start()
        try:
            count = sum(1 for _ in stages.encode_vae._items(missing, {"a": tmp_path}))
            assert count == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(100_000) < 3 * peak(10_000), "ten times, if all were at once"
