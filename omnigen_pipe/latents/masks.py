"""Loss masks at the latents' resolution, made and cached beside the latents. Imports no torch.

A mask is kept as a latent is: in a shard, under a key of its own (`mask_key` in the place of the
pixels_key), with a row in the latents log. The place of the VAE's key is taken by one that all
masks share, so that what checks, moves and clears away latents does the same for masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field

from omnigen_pipe.images.originals import ChangedSourceError
from omnigen_pipe.images.weighing import MaskItem, verdict, weigh
from omnigen_pipe.latents.shards import MASKS_KEY, ShardWriter


@dataclass
class Outcome:
    """What became of the items: how many masks were made, and which were not, with the reason.

    The files of `changed` ones are not what discover saw.
    """

    made: int = 0
    failed: list[tuple[MaskItem, str]] = field(default_factory=list)
    changed: list[tuple[MaskItem, list[str]]] = field(default_factory=list)


def make_masks(
    items: Iterable[MaskItem],
    writer: ShardWriter,
    advance: Callable[[int], object],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Weigh `items`, which lie bucket by bucket, into `writer`: float32 `[1, H/8, W/8]` each.

    Returns early once `asked_to_stop` is true.
    """
    outcome = Outcome()
    with closing(weigh(items)) as weighed:
        for item, weights in weighed:
            if asked_to_stop():
                break
            writer.close_all_but({item.bucket_name})
            if isinstance(weights, ChangedSourceError):
                outcome.changed.append((item, weights.faults))
            elif isinstance(weights, Exception) or not weights.any():
                # Not of samples that bucket made: it leaves such masks out.
                reason = verdict(weights) or ""
                outcome.failed.append((item, reason))
                writer.add_failure(item.mask_key, item.bucket_name, reason)
            else:
                facts = {
                    "pixels_key": item.mask_key,
                    "vae_key": MASKS_KEY,
                    "content_hash": item.mask_hash,
                    "bucket": item.bucket_name,
                    "resize": list(item.resize),
                    "crop": list(item.crop),
                }
                writer.add(item.mask_key, item.bucket_name, weights[None], facts)
                outcome.made += 1
            advance(1)
    return outcome
