"""A sample's draws depend on its own name alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.keys import key
from omnigen_pipe.training.draws import Appearance

APPEARANCES = st.builds(
    Appearance,
    st.integers(0, 5),
    st.sampled_from(["a", "b", "ab"]),
    st.integers(0, 5),
    st.integers(0, 5),
)


@settings(max_examples=200, deadline=None)
@given(one=APPEARANCES, other=APPEARANCES)
def test_streams_are_equal_exactly_when_the_names_are(one: Appearance, other: Appearance) -> None:
    equal = torch.equal(one.normal("noise", (8,)), other.normal("noise", (8,)))
    assert equal == (one == other)


@settings(max_examples=100, deadline=None)
@given(one=APPEARANCES)
def test_a_stream_is_the_philox_of_the_whole_key(one: Appearance) -> None:
    name = key(one.seed, one.sample_id, one.epoch, one.repeat, "noise")
    expected = np.random.Generator(np.random.Philox(key=int(name, 16)))
    found = one.stream("noise")
    assert np.array_equal(found.integers(2**63, size=9), expected.integers(2**63, size=9))
    assert found.standard_normal(9).tolist() == expected.standard_normal(9).tolist()


def test_purposes_have_streams_of_their_own() -> None:
    one = Appearance(1, "a", 0, 0)
    assert not torch.equal(one.normal("noise", (8,)), one.normal("posterior", (8,)))


def test_a_larger_draw_begins_with_the_smaller_one() -> None:
    """So that nothing depends on how much is drawn at once."""
    one = Appearance(1, "a", 0, 0)
    assert torch.equal(one.normal("noise", (64,))[:8], one.normal("noise", (8,)))


def test_the_draws_are_standard_normal_float32_and_uncorrelated() -> None:
    draws = torch.stack([Appearance(0, f"s{i}", 0, 0).normal("noise", (256,)) for i in range(400)])
    assert draws.dtype == torch.float32
    assert abs(draws.mean().item()) < 0.01
    assert abs(draws.std().item() - 1) < 0.01
    assert abs((draws[:, 0] * draws[:, 1]).mean().item()) < 0.2


def test_choices_and_chances_have_their_rates() -> None:
    appearances = [Appearance(0, f"s{i}", 0, 0) for i in range(2000)]
    share = sum(m.chance("dropout", 0.1) for m in appearances) / len(appearances)
    assert 0.07 < share < 0.13
    assert {m.choice("caption", 3) for m in appearances} == {0, 1, 2}
    assert not any(m.chance("dropout", 0.0) for m in appearances)
    assert all(m.chance("dropout", 1.0) for m in appearances)
