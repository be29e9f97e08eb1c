"""The encoder: latents equal diffusers' own, and nothing that fails touches its neighbours."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from PIL import Image

from manifests.errors import PipeError
from omnigen_pipe.config import parse
from omnigen_pipe.images.originals import ChangedSourceError
from omnigen_pipe.images.pixels import PixelsError
from omnigen_pipe.latents import encoder
from omnigen_pipe.latents.encoder import (
    Item,
    encode,
    encode_pixels,
    read_source,
)
from omnigen_pipe.latents.shards import ShardWriter, read_latent, shard_path
from omnigen_pipe.latents.vae import load_vae
from omnigen_pipe.workspace import Workspace

VAE_KEY = "f" * 32


def workspace(root: Path, **vae: Any) -> Workspace:
    root.mkdir(exist_ok=True)
    return Workspace(root, parse({"vae": {"latent_dtype": "fp32", **vae}}, "test"))


@pytest.fixture(scope="module")
def vae(small_omnigen: Path) -> Any:
    import torch

    return load_vae(small_omnigen / "vae", parse({}, "test").vae, torch.device("cpu"))


def item(folder: Path, number: int, bucket: tuple[int, int] = (48, 32)) -> Item:
    """An item with its image of noise, written as `number`.png."""
    path = folder / f"{number}.png"
    size = (bucket[0] + 9, bucket[1] + 4)
    noise = np.random.default_rng(number).integers(0, 256, (size[1] * 2, size[0] * 2, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content_hash = blake3(path.read_bytes()).hexdigest()[:32]
    return Item(path.name, f"{number:032x}", content_hash, bucket, size, (5, 2), (path,))


def geometries(first: Item, *wanted: tuple[tuple[int, int], tuple[int, int]]) -> list[Item]:
    """`first`, and its image in further geometries: buckets, and crops of twice their size."""
    more = [
        replace(
            first,
            pixels_key=f"{number:x}{first.pixels_key[1:]}",
            bucket=bucket,
            resize=(2 * bucket[0], 2 * bucket[1]),
            crop=crop,
        )
        for number, (bucket, crop) in enumerate(wanted, start=1)
    ]
    return [first, *more]


def run(
    place: Workspace,
    items: list[Item],
    vae: Any,
    advance: Callable[[int], object] = lambda _: None,
    **options: Any,
) -> tuple[encoder.Outcome, dict[str, np.ndarray]]:
    """Encode and read back: the outcome, and the latents by pixels_key."""
    import torch

    with ShardWriter(place, VAE_KEY, {}) as writer:
        outcome = encode(
            items,
            vae,
            writer,
            place.config,
            VAE_KEY,
            torch.device("cpu"),
            advance,
            **options,
        )
    return outcome, latents(place)


def latents(place: Workspace) -> dict[str, np.ndarray]:
    rows = [row for row in place.latents.read().to_pylist() if row["status"] == "ok"]
    found = {
        row["pixels_key"]: read_latent(
            shard_path(place.root, row["shard"]),
            row["offset"],
            row["nbytes"],
            row["checksum"],
            tuple(row["shape"]),
            row["dtype"],
        )
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def reference(thing: Item, vae: Any) -> np.ndarray:
    """diffusers' VAE on the image cropped with Pillow alone, by diffusers' own preprocessing."""
    import torch
    from diffusers.image_processor import VaeImageProcessor

    left, top = thing.crop
    box = (left, top, left + thing.bucket[0], top + thing.bucket[1])
    with Image.open(thing.paths[0]) as image:
        cropped = image.convert("RGB").resize(thing.resize, Image.Resampling.LANCZOS).crop(box)
    x = VaeImageProcessor(vae_scale_factor=8).preprocess(cropped)
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    return np.asarray(torch.cat([posterior.mean, posterior.logvar], 1)[0])


def test_latents_equal_diffusers_on_images_cropped_by_pillow(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(3)] + [item(tmp_path, 9, (32, 64))]
    place = workspace(tmp_path / "w", vae_batch_size=1)
    outcome, found = run(place, items, vae)
    assert outcome.encoded == len(found) == 4
    for thing in items:
        assert found[thing.pixels_key].shape == (8, thing.bucket[1] // 8, thing.bucket[0] // 8)
        assert np.array_equal(found[thing.pixels_key], reference(thing, vae))


def test_float16_is_the_rounded_float32(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, 1)]
    _, exact = run(workspace(tmp_path / "w"), items, vae)
    _, half = run(workspace(tmp_path / "v", latent_dtype="fp16"), items, vae)
    (a,), (b,) = exact.values(), half.values()
    assert b.dtype == np.float16
    assert np.array_equal(a.astype(np.float16), b)


def test_a_batch_of_one_equals_a_batch_of_many(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(7)]
    _, ones = run(workspace(tmp_path / "w", vae_batch_size=1), items, vae)
    _, many = run(workspace(tmp_path / "v", vae_batch_size=4), items, vae)
    assert ones.keys() == many.keys()
    for key, latent in ones.items():
        np.testing.assert_allclose(many[key], latent, rtol=1e-3, atol=1e-5)


SMALL, LARGE = (32, 16), (64, 48)


def of_all_sorts(folder: Path) -> list[Item]:
    """Images in one to four geometries, crops of one size among them, in the order of work: those
    of the same buckets together."""
    crops = ((SMALL, (0, 0)), (SMALL, (7, 3)))
    return [
        *(item(folder, n) for n in range(3)),
        *(each for n in range(3, 8) for each in geometries(item(folder, n), (LARGE, (3, 5)))),
        *(each for n in range(8, 11) for each in geometries(item(folder, n), *crops)),
        *(
            each
            for n in range(11, 14)
            for each in geometries(item(folder, n), (LARGE, (0, 1)), *crops)
        ),
    ]


def test_latents_are_what_each_geometry_gives_alone(tmp_path: Path, vae: Any) -> None:
    """Byte by byte in batches of one; in others within what another batch may change."""
    items = of_all_sorts(tmp_path)
    alone: dict[str, np.ndarray] = {}
    for number, thing in enumerate(items):
        alone |= run(workspace(tmp_path / str(number), vae_batch_size=1), [thing], vae)[1]
    assert len(alone) == len(items) == 3 + 5 * 2 + 3 * 3 + 3 * 4
    for name, size in (("ones", 1), ("threes", 3)):
        advanced: list[int] = []
        outcome, found = run(
            workspace(tmp_path / name, vae_batch_size=size), items, vae, advance=advanced.append
        )
        assert outcome.encoded == sum(advanced) == len(items)
        assert found.keys() == alone.keys()
        for key, latent in alone.items():
            if size == 1:
                assert found[key].tobytes() == latent.tobytes()
            else:
                np.testing.assert_allclose(found[key], latent, rtol=1e-3, atol=1e-5)


def test_in_whatever_order_images_come_each_latent_is_encoded_once(tmp_path: Path) -> None:
    items = of_all_sorts(tmp_path)
    hashes = list(dict.fromkeys(each.content_hash for each in items))
    images = [[each for each in items if each.content_hash == one] for one in hashes]
    for seed in range(5):
        random.Random(seed).shuffle(images)
        place = workspace(tmp_path / str(seed), vae_batch_size=3)
        outcome, found = run(place, list(chain(*images)), Stub(lambda _: None))
        assert outcome.encoded == len(found) == len(items)


def test_batches_are_full_where_images_share_their_buckets(tmp_path: Path) -> None:
    """Five images in two buckets, in batches of three: two of each bucket."""
    items = [e for n in range(5) for e in geometries(item(tmp_path, n), (LARGE, (0, 0)))]
    stub = Stub(lambda _: None)
    run(workspace(tmp_path / "w", vae_batch_size=3), items, stub)
    assert stub.shapes == [(3, 32, 48), (3, 48, 64), (2, 32, 48), (2, 48, 64)]


def test_an_image_that_fails_is_told_of_for_each_geometry(tmp_path: Path, vae: Any) -> None:
    images = [geometries(item(tmp_path, n), (LARGE, (0, 0))) for n in range(5)]
    images[1][0].paths[0].unlink()
    broken = images[3][0].paths[0]
    broken.write_bytes(broken.read_bytes()[:-200])
    truncated = blake3(broken.read_bytes()).hexdigest()[:32]
    images[3] = [replace(each, content_hash=truncated) for each in images[3]]
    advanced: list[int] = []
    place = workspace(tmp_path / "w", vae_batch_size=2)
    outcome, found = run(place, list(chain(*images)), vae, advance=advanced.append)
    assert [each for each, _ in outcome.changed] == images[1]
    assert [each for each, _ in outcome.failed] == images[3]
    good = images[0] + images[2] + images[4]
    assert found.keys() == {each.pixels_key for each in good}
    assert (outcome.encoded, sum(advanced)) == (6, 10)
    failures = [row for row in place.latents.read().to_pylist() if row["status"] == "failed"]
    assert [(row["pixels_key"], row["bucket"]) for row in failures] == [
        (each.pixels_key, each.bucket_name) for each in images[3]
    ]


def test_memory_that_is_short_for_one_geometry_leaves_the_other(
    tmp_path: Path, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = geometries(item(tmp_path, 1), (LARGE, (0, 0)))
    real = encoder.read_pixels

    def short_of_memory(data: bytes, bucket: tuple[int, int], *more: Any) -> np.ndarray:
        if bucket == LARGE:
            raise MemoryError
        return real(data, bucket, *more)

    monkeypatch.setattr(encoder, "read_pixels", short_of_memory)
    outcome, found = run(workspace(tmp_path / "w"), items, vae)
    assert found.keys() == {items[0].pixels_key}
    assert [each for each, _ in outcome.unread] == items[1:]


def test_bfloat16_comes_out_in_the_latents_dtype(tmp_path: Path, small_omnigen: Path) -> None:
    import torch

    place = workspace(tmp_path / "w", vae_dtype="bf16")
    items = [item(tmp_path, 1)]
    vae16 = load_vae(small_omnigen / "vae", place.config.vae, torch.device("cpu"))
    _, found = run(place, items, vae16)
    exact = load_vae(
        small_omnigen / "vae", workspace(tmp_path / "w").config.vae, torch.device("cpu")
    )
    (latent,) = found.values()
    assert latent.dtype == np.float32
    expected = reference(items[0], exact)
    np.testing.assert_allclose(latent, expected, atol=0.05 * np.abs(expected).max())


def test_log_variance_is_clamped(vae: Any) -> None:
    import torch

    class Wild:
        dtype = torch.float32

        def encode(self, x: Any) -> Any:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            moments = torch.full((x.shape[0], 8, 2, 2), 99.0)
            moments[:, 4:6] = -99.0
            return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    (found,) = encode_pixels(np.zeros((1, 16, 16, 3), np.uint8), Wild(), torch.device("cpu"))
    assert [channel[0, 0] for channel in found] == [99.0] * 4 + [-30.0, -30.0, 20.0, 20.0]


def test_a_bad_image_in_a_batch_fails_alone(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(6)]
    bad = items[2].paths[0]
    bad.write_bytes(bad.read_bytes()[:-200])
    truncated = blake3(bad.read_bytes()).hexdigest()[:32]
    items[2] = Item(
        "bad.png", *[items[2].pixels_key, truncated], (48, 32), (57, 36), (5, 2), (bad,)
    )
    place = workspace(tmp_path / "w", vae_batch_size=3)
    outcome, found = run(place, items, vae)
    assert [thing.name for thing, _ in outcome.failed] == ["bad.png"]
    assert outcome.encoded == 5
    for thing in items[:2] + items[3:]:
        np.testing.assert_allclose(found[thing.pixels_key], reference(thing, vae), 1e-3, 1e-5)
    (row,) = [row for row in place.latents.read().to_pylist() if row["status"] == "failed"]
    assert row["pixels_key"] == items[2].pixels_key
    assert row["reason"].startswith("cannot be decoded")
    assert (row["shard"], row["bucket"], row["vae_key"]) == (None, "48x32", VAE_KEY)


def test_changed_and_vanished_files_are_no_facts(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(4)]
    items[1].paths[0].write_bytes(items[0].paths[0].read_bytes())
    items[2].paths[0].unlink()
    place = workspace(tmp_path / "w")
    outcome, found = run(place, items, vae)
    assert [thing for thing, _ in outcome.changed] == [items[1], items[2]]
    assert [reasons for _, reasons in outcome.changed] == [
        [f"{tmp_path}/1.png: it has changed"],
        [f"{tmp_path}/2.png: No such file or directory"],
    ]
    assert found.keys() == {items[0].pixels_key, items[3].pixels_key}
    assert place.latents.read().num_rows == 2


def test_too_little_memory_is_no_fact_and_stops_nothing(
    tmp_path: Path, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item(tmp_path, n) for n in range(4)]
    place = workspace(tmp_path / "w", vae_batch_size=2, decode_workers=3)
    real = encoder.read_pixels
    huge = items[1].paths[0].read_bytes()

    def short_of_memory(data: bytes, *arguments: Any) -> np.ndarray:
        if data == huge:
            raise MemoryError
        return real(data, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "read_pixels", short_of_memory)
        outcome, found = run(place, items, vae)
    assert found.keys() == {i.pixels_key for i in (items[0], items[2], items[3])}
    ((unread, reason),) = outcome.unread
    assert unread == items[1]
    assert reason == "not read this time: too little memory; lower decode_workers (3 now)"
    assert (outcome.failed, outcome.changed) == ([], [])
    assert place.latents.read().num_rows == 3
    _, found = run(place, [items[1]], vae)
    assert len(found) == 4


def test_as_many_decode_workers_as_cores_may_be_used(
    tmp_path: Path, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = encoder.ThreadPoolExecutor

    def pool(workers: int, **options: Any) -> Any:
        asked.append(workers)
        return real(workers, **options)

    monkeypatch.setattr(encoder, "ThreadPoolExecutor", pool)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 7, 9}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    run(workspace(tmp_path / "w"), [item(tmp_path, 1)], vae)
    run(workspace(tmp_path / "v", decode_workers=2), [item(tmp_path, 1)], vae)
    assert asked == [3, 2]


def test_any_file_with_the_bytes_will_do(tmp_path: Path) -> None:
    good = item(tmp_path, 1)
    other = tmp_path / "other.png"
    other.write_bytes(b"changed")
    gone = tmp_path / "gone.png"
    paths = (gone, other, *good.paths)
    thing = Item("x", good.pixels_key, good.content_hash, (48, 32), (57, 36), (5, 2), paths)
    assert read_source([thing]) == good.paths[0].read_bytes()
    thing = Item("x", good.pixels_key, good.content_hash, (48, 32), (57, 36), (5, 2), paths[:2])
    with pytest.raises(ChangedSourceError, match=r"gone\.png: .*; .*other\.png: it has changed"):
        read_source([thing])


def test_what_float16_cannot_hold_fails_by_name(tmp_path: Path, small_omnigen: Path) -> None:
    import torch

    cpu = torch.device("cpu")
    place = workspace(tmp_path / "w", latent_dtype="fp16")
    loud = load_vae(small_omnigen / "vae", place.config.vae, cpu)
    with torch.no_grad():
        loud.quant_conv.bias[:4] = 1e5  # above float16's 65504
    items = [item(tmp_path, n) for n in range(2)]
    outcome, found = run(place, items, loud)
    assert found == {}
    assert outcome.encoded == 0
    assert [reason for _, reason in outcome.failed] == [
        "its latent is not finite with vae_dtype = fp32 and latent_dtype = fp16: set them to fp32"
    ] * 2


def test_too_little_memory_says_what_to_lower(tmp_path: Path, vae: Any) -> None:
    import torch

    class Greedy:
        dtype = torch.float32
        calls = 0

        def encode(self, x: Any) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return vae.encode(x)

    items = [item(tmp_path, n) for n in range(4)]
    place = workspace(tmp_path / "w", vae_batch_size=2)
    with pytest.raises(PipeError, match=r"2 images of 48x32.*Lower vae_batch_size"):
        run(place, items, Greedy())
    assert latents(place).keys() == {thing.pixels_key for thing in items[:2]}


def test_other_errors_of_torch_pass_through(tmp_path: Path) -> None:
    import torch

    class Broken:
        dtype = torch.float32

        def encode(self, x: Any) -> Any:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    with pytest.raises(RuntimeError, match="CUDNN_STATUS"):
        run(workspace(tmp_path / "w"), [item(tmp_path, 1)], Broken())


def test_stopping_publishes_whole_batches(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(9)]
    place = workspace(tmp_path / "w", vae_batch_size=2)
    asked = iter([False] * 5 + [True] * 9)
    outcome, found = run(place, items, vae, asked_to_stop=lambda: next(asked))
    assert outcome.stopped
    assert found.keys() == {thing.pixels_key for thing in items[:4]}
    assert outcome.encoded == 4


def test_look_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item(tmp_path, n) for n in range(30)]
    config = workspace(tmp_path / "w", vae_batch_size=3, decode_workers=2).config
    lock, started = threading.Lock(), 0

    def counted(image: list[Item]) -> bytes:
        nonlocal started
        with lock:
            started += 1
        return image[0].paths[0].read_bytes()

    monkeypatch.setattr(encoder, "read_source", counted)
    decoded = encoder._decoded(items, config)
    for taken in range(1, 11):
        thing, _, _ = next(decoded)
        assert thing is items[taken - 1]
        assert started <= taken + 3 + 2 * 2
    decoded.close()
    assert started <= 10 + 3 + 2 * 2


def test_what_cannot_be_decoded_keeps_no_image_alive(tmp_path: Path) -> None:
    """An error's traceback would: of every broken file that waits to be told of."""
    broken, changed = item(tmp_path, 0), item(tmp_path, 1)
    whole = broken.paths[0].read_bytes()
    broken.paths[0].write_bytes(whole[: len(whole) // 2])
    cut = blake3(broken.paths[0].read_bytes()).hexdigest()[:32]
    changed.paths[0].write_bytes(whole)
    items = [replace(broken, content_hash=cut), changed]
    decoded = encoder._decoded(items, workspace(tmp_path / "w").config)
    results = [result for _, result, _ in decoded]
    assert [type(result) for result in results] == [PixelsError, ChangedSourceError]
    assert str(results[0]).startswith("cannot be decoded")
    for result in results:
        assert isinstance(result, Exception)
        assert (result.__traceback__, result.__cause__, result.__context__) == (None, None, None)


class Stub:
    """A VAE whose latents are zeros; `during` is called with the number of each batch."""

    dtype = torch.float32

    def __init__(self, during: Callable[[int], object]) -> None:
        self.during = during
        self.batches = 0
        #: (number, height, width) of each batch.
        self.shapes: list[tuple[int, int, int]] = []

    def encode(self, x: torch.Tensor) -> Any:
        self.during(self.batches)
        self.batches += 1
        b, _, height, width = x.shape
        self.shapes.append((b, height, width))
        zeros = torch.zeros(b, 4, height // 8, width // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=zeros, logvar=zeros))


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("number", [12, 60])
def test_decoded_images_and_open_shards_are_few_however_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, buckets: int
) -> None:
    """Alive are the batches of the image's buckets, and what is decoded ahead: a batch of images
    and two for each thread, in all of their geometries. Open is a shard for each bucket."""
    lock, alive, most = threading.Lock(), 0, 0

    def gone() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def decode(data: bytes, bucket: tuple[int, int], *_: Any) -> np.ndarray:
        nonlocal alive, most
        pixels = np.zeros((bucket[1], bucket[0], 3), np.uint8)
        weakref.finalize(pixels, gone)
        with lock:
            alive += 1
            most = max(most, alive)
        return pixels

    monkeypatch.setattr(encoder, "read_source", lambda _: b"")
    monkeypatch.setattr(encoder, "read_pixels", decode)
    first = item(tmp_path, 0)
    # Half of the images lie in other buckets than the rest.
    items = [
        replace(
            first,
            pixels_key=f"{each:030x}{side:02x}",
            content_hash=f"{each:032x}",
            bucket=(16 * side + 160 * (each < number // 2), 16),
        )
        for each in range(number)
        for side in range(1, buckets + 1)
    ]
    place = workspace(tmp_path / "w", vae_batch_size=3, decode_workers=2)
    opened: list[int] = []
    stub = Stub(lambda _: opened.append(len(list(place.staging.glob("*.tar")))))
    outcome, found = run(place, items, stub)
    assert outcome.encoded == len(found) == number * buckets
    # The last is the image that is handed over.
    assert 3 * buckets <= most <= buckets * (2 * 3 + 2 * 2 + 1)
    assert max(opened) == buckets
    assert len(list(place.root.glob("latents/*/*.tar"))) == 2 * buckets
    assert alive == 0


def test_images_are_decoded_while_the_vae_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch does not end before an image of the second is read, which needs no end of
    the first."""
    second = threading.Event()
    met = []

    def source(image: list[Item]) -> bytes:
        if image[0].pixels_key == f"{2:032x}":
            second.set()
        return b""

    monkeypatch.setattr(encoder, "read_source", source)
    monkeypatch.setattr(encoder, "read_pixels", lambda *_: np.zeros((32, 48, 3), np.uint8))
    first = item(tmp_path, 0)
    items = [
        replace(first, pixels_key=f"{each:032x}", content_hash=f"{each:032x}") for each in range(4)
    ]
    place = workspace(tmp_path / "w", vae_batch_size=2, decode_workers=1)
    run(place, items, Stub(lambda batch: met.append(batch or second.wait(60))))
    assert met == [True, 1]


def test_same_batches_give_equal_shards(tmp_path: Path, vae: Any) -> None:
    items = [item(tmp_path, n) for n in range(5)]
    tars = []
    for name in ("one", "two"):
        place = workspace(tmp_path / name, vae_batch_size=2)
        run(place, items, vae)
        tars.append([path.read_bytes() for path in sorted(place.root.glob("latents/*/*.tar"))])
    assert len(tars[0]) == 1
    assert tars[0] == tars[1]
