"""The rehearsal: as large as anything that comes, and without a trace where it passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import PipeError
from omnigen_pipe.config import LokrConfig, TrainConfig, parse
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.training import preflight
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.preflight import largest_batch, rehearse
from omnigen_pipe.training.trainee import Trainee, load_trainee
from omnigen_pipe.workspace import Workspace

_BUCKETS = ("16x16", "32x16", "64x64", "64x80", "128x128")

_SAMPLES = st.lists(
    st.tuples(
        st.sampled_from(_BUCKETS),
        st.integers(0, 3),  # repeats
        st.lists(st.integers(1, 40), min_size=1, max_size=3),  # lengths of its prompts
        st.sampled_from(["train", "regularisation"]),
    ),
    min_size=1,
    max_size=12,
)


def _frozen(samples: list[tuple[str, int, list[int], str]], dropout: int) -> FrozenSamples:
    buckets, repeats, lengths, splits = zip(*samples, strict=True)
    names = tuple(sorted(set(buckets)))
    table = pa.table(
        {
            "bucket": list(buckets),
            "split": list(splits),
            "prompts": [[[7] * length for length in each] for each in lengths],
        }
    )
    return FrozenSamples(
        table,
        {"dropout_ids": str([8] * dropout)},
        names,
        np.array([names.index(bucket) for bucket in buckets]),
        np.array(repeats, dtype=np.int64),
    )


@settings(max_examples=150, deadline=None)
@given(samples=_SAMPLES, dropout=st.integers(1, 50), batch_size=st.integers(1, 6))
def test_no_micro_batch_of_any_epoch_has_more_tokens_or_a_longer_prompt(
    samples: list[tuple[str, int, list[int], str]], dropout: int, batch_size: int
) -> None:
    frozen = _frozen(samples, dropout)
    config = TrainConfig(train_batch_size=batch_size)
    largest = largest_batch(frozen, config, patch_size=2)
    rows, prompt = len(largest.prompts), len(largest.prompts[0])
    width, height = map(int, largest.bucket.split("x"))
    assert largest.x1.shape == (rows, 4, height // 8, width // 8)
    assert {len(each) for each in largest.prompts} == {prompt}
    tokens = rows * (prompt + largest.x1[0, 0].numel() // 4)
    reached = False
    for epoch in range(3):
        order = frozen.order(epoch, config, 2)
        for index in range(len(order)):
            for micro in order.global_batch(index):
                bucket, _, _, _ = samples[micro.samples[0]]
                wide, high = map(int, bucket.split("x"))
                longest = max(dropout, *(max(samples[i][2]) for i in micro.samples))
                assert longest <= prompt
                count = len(micro.samples)
                assert count * (longest + wide * high // 256) <= tokens
                reached |= (count, bucket) == (rows, largest.bucket)
    assert reached, "no larger than what comes, too"
    assert largest.regularisation.any() == any(s[3] == "regularisation" for s in samples)


def test_many_small_images_with_long_prompts_are_more_than_one_large_one() -> None:
    samples = [("128x128", 0, [40], "train")] + [("64x64", 0, [3], "train")] * 4
    assert largest_batch(_frozen(samples, 1), TrainConfig(train_batch_size=4), 2).bucket == "64x64"


def _trainee(model: Path, **options: object) -> Trainee:
    train = {"gradient_checkpointing": False, "use_ema": True, **options}
    config = parse({"model": {"pretrained_model_name_or_path": str(model)}, "train": train}, "test")
    return load_trainee(Workspace(model, config), LokrConfig(), torch.device("cpu"))


def _batch() -> Batch:
    samples = [("64x80", 3, [9], "train"), ("64x64", 0, [4], "regularisation")]
    return largest_batch(_frozen(samples, 2), TrainConfig(train_batch_size=4), 2)


def test_a_passing_rehearsal_leaves_no_trace(small_omnigen: Path) -> None:
    trainee = _trainee(small_omnigen)
    assert trainee.ema is not None
    trainee.gradients.flat.fill_(7.0)  # of a step before: it must not stay either
    before = [p.detach().clone() for p in trainee.transformer.parameters()]
    before += [p.detach().clone() for p in trainee.parameters()]
    averages = {name: weight.clone() for name, weight in trainee.ema.weights.items()}
    random = torch.get_rng_state()
    rehearse(trainee, _batch(), TrainConfig(), "")
    after = [*trainee.transformer.parameters(), *trainee.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(averages[n], weight) for n, weight in trainee.ema.weights.items())
    assert not trainee.gradients.flat.any()
    assert not trainee.optimizer.state
    assert torch.equal(random, torch.get_rng_state())
    assert trainee.network.multiplier == 1.0


def test_too_little_memory_is_said_with_what_was_tried(
    small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(preflight, "sample_losses", exhausted)
    with pytest.raises(
        PipeError, match=r"4 samples of 64x80 with 9 tokens, was tried before.*ADVICE"
    ):
        rehearse(_trainee(small_omnigen), _batch(), TrainConfig(), "ADVICE")
