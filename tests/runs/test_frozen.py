"""Freezing: what is complete is in, what lacks something is counted, and the reader agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from manifests.errors import ManifestError, PipeError
from manifests.schema import LATENTS, PROMPTS, SAMPLES
from omnigen_pipe.config import parse
from omnigen_pipe.images.samples import samples_fingerprint, samples_settings
from omnigen_pipe.latents.shards import DamagedLatentError, ShardWriter
from omnigen_pipe.runs.frozen import FrozenSamples, content_key, freeze, join, locate
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.settings import as_text
from omnigen_pipe.training.batches import BatchReader
from omnigen_pipe.training.draws import Appearance
from omnigen_pipe.workspace import Workspace

VAE, TOKENIZER = "v" * 32, "t" * 32
METADATA = {"vae_key": VAE, "scaling_factor": "0.5", "dropout_ids": "[8, 9]"}


def _sample(number: int, **changes: object) -> dict[str, object]:
    return {
        "sample_id": f"s{number}",
        "dataset": "d",
        "split": "train",
        "path": f"{number}.png",
        "bucket": "32x16" if number % 2 else "16x16",
        "pixels_key": f"{number:032x}",
        "captions": ["one", "two"],
        "prompt_keys": ["p1", "p2"],
        "repeats": number,
        "status": "ok",
        **changes,
    }


def _moments(number: int) -> np.ndarray:
    width = 4 if number % 2 else 2
    values = np.random.default_rng(number).normal(size=(8, 2, width))
    return values.astype(np.float16)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Six wanted samples: 0 to 3 complete (3 regularisation), 4 without latent, 5 failed."""
    here = Workspace(tmp_path, parse({"train": {"seed": 5}}, "test"))
    rows = [_sample(n) for n in range(6)]
    rows[3]["split"] = "regularisation"
    rows += [
        _sample(6, split="eval", pixels_key=f"{0:032x}", bucket="16x16"),
        _sample(7, status="filtered"),
        _sample(8, pixels_key=f"{1:032x}", prompt_keys=["p1", "unknown"]),
    ]
    here.samples.replace(
        pa.Table.from_pylist(rows, SAMPLES.schema),
        settings=as_text(samples_settings(here.config)),
        fingerprint=samples_fingerprint(here.images.source(), here.config),
    )
    prompts = [("p1", [1, 2]), ("p2", [3, 4, 5])]
    here.prompts.append(
        pa.Table.from_pylist(
            [
                {"prompt_key": k, "tokenizer_key": TOKENIZER, "input_ids": ids, "status": "ok"}
                for k, ids in prompts
            ],
            PROMPTS.schema,
        )
    )
    with ShardWriter(here, VAE, {}) as writer:
        for number in (0, 2, 1, 3):
            bucket = "32x16" if number % 2 else "16x16"
            writer.add(f"{number:032x}", bucket, _moments(number), {"bucket": bucket})
    failed = {"pixels_key": f"{5:032x}", "vae_key": VAE, "status": "failed", "reason": "broken"}
    here.latents.append(pa.Table.from_pylist([failed], LATENTS.schema))
    return here


def _frozen(workspace: Workspace) -> FrozenSamples:
    path = workspace.root / "samples.arrow"
    freeze(join(workspace, VAE, TOKENIZER).table, path, workspace.staging, METADATA)
    return FrozenSamples.open(path)


def test_every_wanted_sample_is_frozen_or_counted(workspace: Workspace) -> None:
    found = join(workspace, VAE, TOKENIZER)
    assert found.table["sample_id"].to_pylist() == ["s0", "s1", "s2", "s3", "s6"]
    assert (found.failed, found.incomplete) == (1, 2)
    assert (found.lacking_latent, found.lacking_prompt) == (1, 1)


def test_another_vae_or_tokenizer_lacks_everything(workspace: Workspace) -> None:
    assert join(workspace, "other", TOKENIZER).lacking_latent == 8
    assert join(workspace, VAE, "other").lacking_prompt == 7
    assert join(workspace, "other", "other").incomplete == 8


def test_captions_keep_their_order(workspace: Workspace) -> None:
    assert join(workspace, VAE, TOKENIZER).table["prompts"][0].as_py() == [[1, 2], [3, 4, 5]]


def test_eval_samples_are_frozen_but_never_trained_on(workspace: Workspace) -> None:
    frozen = _frozen(workspace)
    assert frozen.table["sample_id"].to_pylist() == ["s0", "s1", "s2", "s3"]
    assert frozen.repeats.tolist() == [0, 1, 2, 3]
    assert frozen.bucket_names == ("16x16", "32x16")
    assert frozen.largest_token() == 9


def test_the_content_key_sees_every_change_and_no_order(workspace: Workspace) -> None:
    table = join(workspace, VAE, TOKENIZER).table
    assert content_key(table.take([4, 2, 0, 1, 3])) == content_key(table)
    assert content_key(table.slice(1)) != content_key(table)
    checksums = pa.array([1] * table.num_rows, pa.uint64())
    at = table.column_names.index("checksum")
    assert content_key(table.set_column(at, "checksum", checksums)) == content_key(table)


def test_a_damaged_file_is_named(workspace: Workspace) -> None:
    path = workspace.root / "samples.arrow"
    path.write_bytes(b"ARROW1")
    with pytest.raises(ManifestError, match=r"samples\.arrow"):
        FrozenSamples.open(path)


def test_the_reader_gives_what_stock_webdataset_and_the_formulas_give(
    workspace: Workspace,
) -> None:
    frozen = _frozen(workspace)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), workspace.config.train)
    batch = reader.read(MicroBatch(np.array([3, 1]), np.array([2, 0])), epoch=4, step=0)
    urls = [str(p) for p in (workspace.root / "latents" / "32x16").glob("*.tar")]
    stored = {
        sample["__key__"]: sample["moments.npy"]
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }
    assert batch.sample_ids == ["s3", "s1"]
    assert batch.regularisation.tolist() == [True, False]
    for row, (number, repeat) in enumerate([(3, 2), (1, 0)]):
        moments = stored[f"{number:032x}"].astype(np.float32)
        draw = Appearance(5, f"s{number}", 4, repeat)
        noise = draw.normal("posterior", (4, 2, 4)).numpy()
        expected = 0.5 * (moments[:4] + np.exp(0.5 * moments[4:]) * noise)
        np.testing.assert_allclose(batch.x1[row].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.x0[row].numpy(), draw.normal("noise", (4, 2, 4)))
        assert batch.prompts[row] in ([1, 2], [3, 4, 5])


def test_a_sample_is_the_same_in_any_batch(workspace: Workspace) -> None:
    frozen = _frozen(workspace)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), workspace.config.train)
    together = reader.read(MicroBatch(np.array([1, 3]), np.array([1, 0])), 2, step=0)
    alone = reader.read(MicroBatch(np.array([3]), np.array([0])), 2, step=0)
    assert (together.x1[1] == alone.x1[0]).all()
    assert (together.x0[1] == alone.x0[0]).all()
    assert together.t[1] == alone.t[0]
    assert together.prompts[1] == alone.prompts[0]


def test_dropout_replaces_the_prompt_at_its_rate(workspace: Workspace) -> None:
    frozen = _frozen(workspace)
    config = workspace.config.train.model_copy(update={"caption_dropout_probability": 0.5})
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    prompts = [
        reader.read(MicroBatch(np.array([0]), np.array([0])), e, step=0).prompts[0]
        for e in range(200)
    ]
    assert 70 < prompts.count([8, 9]) < 130
    assert prompts.count([1, 2]) > 20
    assert prompts.count([3, 4, 5]) > 20


def test_a_flipped_bit_or_a_lost_shard_is_never_trained_on(workspace: Workspace) -> None:
    frozen = _frozen(workspace)
    places = locate(workspace, frozen)
    reader = BatchReader(workspace, frozen, places, workspace.config.train)
    shard = workspace.root / places.latents.shards[0]
    data = bytearray(shard.read_bytes())
    data[int(places.latents.offsets[0]) + 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedLatentError, match="encode-vae"):
        reader.read(MicroBatch(np.array([0]), np.array([0])), 0, step=0)
    shard.unlink()
    with pytest.raises(PipeError, match="encode-vae"):
        locate(workspace, frozen)
    with pytest.raises(PipeError, match="encode-vae"):
        reader.read(MicroBatch(np.array([0]), np.array([0])), 0, step=0)


def test_latents_that_moved_or_were_encoded_again_are_found_in_the_middle_of_a_run(
    workspace: Workspace,
) -> None:
    frozen = _frozen(workspace)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), workspace.config.train)
    micro = MicroBatch(np.array([0, 2]), np.array([0, 0]))
    before = reader.read(micro, 0, step=0)
    (workspace.root / reader.locations.latents.shards[0]).unlink()
    with ShardWriter(workspace, VAE, {}) as writer:
        for number in (0, 2):
            # Another batch may change the last bits.
            moments = _moments(number) * np.float16(1 + 2**-10)
            writer.add(f"{number:032x}", "16x16", moments, {})
    after = reader.read(micro, 0, step=0)
    assert reader.locations.reencoded == 2
    np.testing.assert_allclose(after.x1, before.x1, rtol=0.02, atol=0.02)
    assert (after.x0 == before.x0).all()
