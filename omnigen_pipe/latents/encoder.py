"""Encoding: images are read and decoded in threads while the main thread runs the VAE.

The order is that of the items: image by image, each read and decoded once for all of its
geometries, and images that are wanted in the same buckets together. So few buckets are open at
once: those of the image in work. Each has a batch of its own, which takes the next images of its
bucket that could be decoded; one that could not leaves no gap and shifts nothing, because every
latent travels with its own key.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import PipeError
from omnigen_pipe.config import Config
from omnigen_pipe.cores import usable_cores
from omnigen_pipe.images.originals import ChangedSourceError, read_original
from omnigen_pipe.images.pixels import Made, PixelsError, read_pixels
from omnigen_pipe.latents.shards import DTYPES, ShardWriter

if TYPE_CHECKING:
    import torch

_NUMPY_DTYPES = {"fp16": "float16", "fp32": "float32"}


class TooLittleMemoryError(PipeError):
    """There was no memory to read or decode the image this time: no fact about its content."""


@dataclass(frozen=True)
class Item:
    """One latent to encode: keys, geometry in pixels, and the files that hold the image.

    `name` is what messages call it.
    """

    name: str
    pixels_key: str
    content_hash: str
    bucket: tuple[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]
    paths: tuple[Path, ...]

    @property
    def bucket_name(self) -> str:
        """The bucket as manifests write it."""
        return f"{self.bucket[0]}x{self.bucket[1]}"

    def facts(self, vae_key: str) -> dict[str, Any]:
        """What a shard's JSON says of it: keys and geometry, no paths."""
        return {
            "pixels_key": self.pixels_key,
            "vae_key": vae_key,
            "content_hash": self.content_hash,
            "bucket": self.bucket_name,
            "resize": list(self.resize),
            "crop": list(self.crop),
        }


@dataclass
class Outcome:
    """What became of the items: how many were encoded, and which were not, with the reason.

    `failed` ones cannot be encoded; the files of `changed` ones, each named in a reason, are not
    what discover saw; and for `unread` ones memory was too short this time.
    """

    encoded: int = 0
    failed: list[tuple[Item, str]] = field(default_factory=list)
    changed: list[tuple[Item, list[str]]] = field(default_factory=list)
    unread: list[tuple[Item, str]] = field(default_factory=list)
    stopped: bool = False


def read_source(image: Sequence[Item]) -> bytes:
    """The bytes of the image of these items, from the first of its files that still holds what
    discover saw.

    Raises `ChangedSourceError` where none does.
    """
    return read_original([path for item in image for path in item.paths], image[0].content_hash)


def encode(
    items: Iterable[Item],
    vae: Any,
    writer: ShardWriter,
    config: Config,
    vae_key: str,
    device: torch.device,
    advance: Callable[[int], object],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Encode `items` into `writer`. They lie image by image, those of the same buckets together.

    An image that cannot be decoded becomes a failure in the log; one whose file changed since
    discover, or for which memory is too short, is only listed in the outcome. Returns early,
    with `stopped` set, after the batch in which `asked_to_stop` became true. Raises `PipeError`
    where the device has too little memory for a batch; other errors of torch pass through.
    """
    outcome = Outcome()
    batches: dict[str, list[tuple[Item, np.ndarray]]] = {}

    def flush(bucket: str) -> None:
        batch = batches.pop(bucket)
        _encode_batch(batch, vae, writer, config, vae_key, device, outcome)
        advance(len(batch))
        batch.clear()  # the loop still knows it

    decoded = _decoded(items, config)
    try:
        for item, result, buckets in decoded:
            if asked_to_stop():
                outcome.stopped = True
                break
            for bucket in [each for each in batches if each not in buckets]:
                flush(bucket)
            writer.close_all_but(buckets)
            if isinstance(result, ChangedSourceError):
                outcome.changed.append((item, result.faults))
                advance(1)
            elif isinstance(result, TooLittleMemoryError):
                outcome.unread.append((item, str(result)))
                advance(1)
            elif isinstance(result, PixelsError):
                outcome.failed.append((item, str(result)))
                writer.add_failure(item.pixels_key, item.bucket_name, str(result))
                advance(1)
            else:
                batch = batches.setdefault(item.bucket_name, [])
                batch.append((item, result))
                if len(batch) == config.vae.vae_batch_size:
                    flush(item.bucket_name)
            writer.close_if_old()
        if not outcome.stopped:
            for bucket in list(batches):
                flush(bucket)
    finally:
        decoded.close()
    return outcome


_Decoded = np.ndarray | PixelsError | ChangedSourceError | TooLittleMemoryError


def _decoded(
    items: Iterable[Item], config: Config
) -> Generator[tuple[Item, _Decoded, frozenset[str]], None, None]:
    """Each item with its pixels or what went wrong, in order, decoded ahead in threads; and all
    buckets that its image is wanted in.

    At most one batch of images and two per thread lie decoded or being decoded at any time, each
    in all of its geometries.
    """

    def pixels(data: bytes, item: Item, made: Made) -> _Decoded:
        geometry = (item.bucket, item.resize, item.crop)
        try:
            return read_pixels(data, *geometry, config.pixels, made)
        # Never the error itself: its traceback would keep the half-decoded image alive.
        except PixelsError as error:
            return PixelsError(str(error))
        except MemoryError:
            return too_little_memory()

    def decode(image: list[Item]) -> list[_Decoded]:
        try:
            data = read_source(image)
        except ChangedSourceError as error:
            return [ChangedSourceError(error.faults)] * len(image)
        except MemoryError:
            return [too_little_memory()] * len(image)
        made = Made()
        return [pixels(data, item, made) for item in image]

    def too_little_memory() -> TooLittleMemoryError:
        return TooLittleMemoryError(
            f"not read this time: too little memory; lower decode_workers ({workers} now)"
        )

    workers = config.vae.decode_workers or usable_cores()
    waiting = (list(image) for _, image in groupby(items, key=lambda item: item.content_hash))
    pending: deque[tuple[list[Item], Future[list[_Decoded]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def submit(number: int) -> None:
        for image in islice(waiting, number):
            pending.append((image, pool.submit(decode, image)))

    # Pillow warns of odd metadata in words that name no file; filters are global to the process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            submit(config.vae.vae_batch_size + 2 * workers)
            while pending:
                image, future = pending.popleft()
                buckets = frozenset(item.bucket_name for item in image)
                for item, result in zip(image, future.result(), strict=True):
                    yield item, result, buckets
                submit(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_batch(
    batch: list[tuple[Item, np.ndarray]],
    vae: Any,
    writer: ShardWriter,
    config: Config,
    vae_key: str,
    device: torch.device,
    outcome: Outcome,
) -> None:
    import torch

    options = config.vae
    try:
        moments = encode_pixels(np.stack([pixels for _, pixels in batch]), vae, device)
    except torch.OutOfMemoryError as error:
        raise PipeError(
            f"{device} ran out of memory at a batch of {len(batch)} images of "
            f"{batch[0][0].bucket_name}. Lower vae_batch_size ({options.vae_batch_size} now), or "
            "set vae_enable_slicing or vae_enable_tiling to true. What was published before is "
            "kept."
        ) from error
    dtype = _NUMPY_DTYPES[options.latent_dtype]
    with np.errstate(over="ignore"):
        stored = moments.astype(DTYPES[dtype])
    for (item, _), latent in zip(batch, stored, strict=True):
        if np.isfinite(latent).all():
            writer.add(item.pixels_key, item.bucket_name, latent, item.facts(vae_key))
            outcome.encoded += 1
        else:
            reason = (
                f"its latent is not finite with vae_dtype = {options.vae_dtype} and latent_dtype "
                f"= {options.latent_dtype}: set them to fp32"
            )
            writer.add_failure(item.pixels_key, item.bucket_name, reason)
            outcome.failed.append((item, reason))


def encode_pixels(pixels: np.ndarray, vae: Any, device: torch.device) -> np.ndarray:
    """The VAE's posteriors of `pixels`, uint8 `[B, H, W, 3]`, as float32 `[B, 8, H/8, W/8]`.

    Channels 0 to 3 are the mean and 4 to 7 the log-variance, clamped to [-30, 20] by diffusers;
    neither is scaled by `scaling_factor`. 0…255 becomes -1…1 exactly as in diffusers'
    `VaeImageProcessor`.
    """
    import torch

    with torch.inference_mode():
        x_bchw = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255.0
        posterior = vae.encode((2.0 * x_bchw - 1.0).to(vae.dtype)).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu().numpy()
    result: np.ndarray = moments
    return result
