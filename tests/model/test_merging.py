"""Merging: merged weights compute what the adapted model does, and rounding is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.merging import Rounding, by_weight, delta_of, merge, read_deltas
from omnigen_pipe.model.transformer import load_transformer, predict_velocity

ATTENTION = {"target_module": ["Attention"], "module_algo_map": {}}
BOTH = {"target_module": ["Attention", "FeedForward"], "module_algo_map": {}}
#: Every way that LyCORIS stores the factors of a linear layer in this model.
CONFIGS = {
    "full matrices, attention and MLP": {"linear_alpha": 7},
    "full matrices, attention": {"full_matrix": True, "factor": 4, "apply_preset": ATTENTION},
    "low rank, alpha is not the rank": {
        "linear_dim": 3,
        "linear_alpha": 6,
        "factor": 4,
        "apply_preset": BOTH,
    },
    "both factors of low rank": {
        "linear_dim": 1,
        "linear_alpha": 3,
        "factor": 4,
        "decompose_both": True,
        "apply_preset": BOTH,
    },
    "a factor near the square, and a multiplier": {
        "linear_dim": 2,
        "linear_alpha": 1,
        "factor": -1,
        "multiplier": 1.5,
        "apply_preset": ATTENTION,
    },
}


def _adapted(folder: Path, config: LokrConfig) -> tuple[Any, Any]:
    """A transformer with an adapter of random weights, and the adapter's network."""
    transformer = load_transformer(folder / "transformer", torch.float32, torch.device("cpu"))
    network = lokr.attach(transformer, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return transformer, network


def _velocity(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return predict_velocity(transformer, x_t, torch.tensor([0.3, 0.8]), [[5, 6], [7]])


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_merged_model_computes_what_the_adapted_one_does(
    small_omnigen: Path, config: dict[str, Any], strength: float
) -> None:
    """Against LyCORIS' own forward pass in bypass mode."""
    parsed = LokrConfig.model_validate(config)
    adapted, network = _adapted(small_omnigen, parsed)
    network.set_multiplier(strength * parsed.multiplier)
    plain = load_transformer(small_omnigen / "transformer", torch.float32, torch.device("cpu"))
    base = _velocity(plain)
    state = plain.state_dict()
    deltas = by_weight(
        read_deltas(lokr.weights(network)), {name: tuple(w.shape) for name, w in state.items()}
    )
    assert len(deltas) == len(network.loras)
    for name, delta in deltas.items():
        state[name], _ = merge(state[name], delta, strength * parsed.multiplier, torch.float32)
    plain.load_state_dict(state)
    assert _relative(_velocity(plain), _velocity(adapted)) < 1e-5
    assert _relative(base, _velocity(adapted)) > 1e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_changes_are_those_that_lycoris_rebuilds(
    small_omnigen: Path, config: dict[str, Any]
) -> None:
    _, network = _adapted(small_omnigen, LokrConfig.model_validate(config))
    deltas = read_deltas(lokr.weights(network))
    assert deltas.keys() == {module.lora_name for module in network.loras}
    for module in network.loras:
        theirs = module.get_weight(module.shape).detach()
        ours = deltas[module.lora_name]
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.matrix(), theirs, rtol=1e-5, atol=1e-7)
        assert ours.norm == pytest.approx(float(theirs.norm()), rel=1e-5)


def test_the_larger_factor_whole_and_the_smaller_of_low_rank() -> None:
    """LyCORIS' forward pass scales it by alpha / rank; numpy's kron is the reference."""
    draw = np.random.default_rng(0)
    a, b, w2 = (draw.normal(size=size).astype("f4") for size in ((4, 2), (2, 3), (2, 5)))
    named = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2, "alpha": np.float32(3)}
    delta = delta_of("m", {name: torch.tensor(value) for name, value in named.items()})
    np.testing.assert_allclose(delta.matrix().numpy(), 3 / 2 * np.kron(a @ b, w2), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_0_gives_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -0.0], [3e-8, -2.5]]).to(dtype)
    delta = delta_of("m", {"lokr_w1": torch.eye(2), "lokr_w2": torch.ones(1, 1)})
    merged, (rounding,) = merge(weight, delta, 0.0, dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(merged.view(bits), weight.view(bits))
    assert rounding.survival is None
    assert rounding.relative_error is None


def test_merging_leaves_the_weight_as_it_was() -> None:
    weight = torch.ones(2, 2)
    delta = delta_of("m", {"lokr_w1": torch.eye(2), "lokr_w2": torch.ones(1, 1)})
    merged, _ = merge(weight, delta, 1.0, torch.float32)
    assert torch.equal(weight, torch.ones(2, 2))
    assert torch.equal(merged, torch.ones(2, 2) + torch.eye(2))


def _row(*change: float) -> Any:
    return delta_of("m", {"lokr_w1": torch.ones(1, 1), "lokr_w2": torch.tensor([change])})


@pytest.mark.parametrize(
    ("change", "survival", "error"),
    [
        # Above 1 the numbers of bfloat16 lie 2^-7 apart.
        ((2**-7,), 1.0, 0.0),
        ((2**-9,), 0.0, 1.0),
        ((2**-8,), 0.0, 1.0),  # halfway: to the even neighbour, which is 1
        ((2**-7, 2**-9), 16 / 17, (1 / 17) ** 0.5),
        ((3 * 2**-9,), 4 / 3, 1 / 3),  # three quarters are rounded up
    ],
)
def test_what_survives_in_bfloat16_by_hand(
    change: tuple[float, ...], survival: float, error: float
) -> None:
    """Written in bfloat16, and written in float32 and loaded in bfloat16."""
    weight = torch.ones(1, len(change), dtype=torch.bfloat16)
    _, (written,) = merge(weight, _row(*change), 1.0, torch.bfloat16)
    loading = (torch.bfloat16, torch.float32)
    _, (exact, loaded, same) = merge(weight, _row(*change), 1.0, torch.float32, loading)
    for rounding in (written, loaded):
        assert rounding.survival == pytest.approx(survival, abs=1e-12)
        assert rounding.relative_error == pytest.approx(error, abs=1e-12)
    assert exact == same
    assert exact.survival == pytest.approx(1.0)


def test_roundings_add_up() -> None:
    """The sum of two weights' figures is the figure of both side by side."""
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    parts = [merge(ones, _row(change), 1.0, torch.bfloat16)[1][0] for change in (2**-7, 2**-9)]
    together = parts[0] + parts[1]
    assert together.survival == pytest.approx(16 / 17)
    assert together.relative_error == pytest.approx((1 / 17) ** 0.5)
    assert (together + Rounding()) == together


def _to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, by the bits alone."""
    bits = numbers.astype("f4").view("u4")
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype("u4").view("f4")


@pytest.mark.parametrize("size", [1e-5, 6e-5, 1e-3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_survives_of_small_changes_by_numpy(size: float, stored: torch.dtype) -> None:
    draw = np.random.default_rng(3)
    weight = torch.tensor(draw.normal(scale=0.02, size=(32, 48)), dtype=torch.float32).to(stored)
    w1, w2 = draw.normal(size=(4, 4)).astype("f4"), draw.normal(size=(8, 12)).astype("f4")
    parts = {"lokr_w1": torch.tensor(w1), "lokr_w2": torch.tensor(w2)}
    delta = delta_of("m", parts)
    merged, (rounding,) = merge(weight, delta, size, torch.bfloat16)

    exact = weight.float().numpy()
    change = (np.kron(w1, w2) * np.float32(size)).astype("f4")
    rounded = _to_bfloat16(exact + change)
    assert np.array_equal(merged.float().numpy(), rounded)
    written = (rounded - _to_bfloat16(exact)).astype("f8")
    change = change.astype("f8")
    survival = (written * change).sum() / (change**2).sum()
    assert rounding.survival == pytest.approx(survival, rel=1e-5)
    error = np.linalg.norm(written - change) / np.linalg.norm(change)
    assert rounding.relative_error == pytest.approx(error, rel=1e-5)


W1, W2 = torch.ones(2, 2), torch.ones(3, 3)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "is empty"),
        ({"m.lokr_w1": W1}, "m.lokr_w2_a is missing"),
        ({"m.lokr_w1": W1, "m.lokr_w2_a": W2}, "m.lokr_w2_b is missing"),
        ({"m.lokr_w1": W1, "m.lokr_w2_a": W2, "m.lokr_w2_b": W2}, "m.alpha, which scales it, is"),
        (
            {"m.lokr_w1": W1, "m.lokr_w2_a": W2, "m.lokr_w2_b": W1, "m.alpha": torch.tensor(1.0)},
            "do not fit",
        ),
        ({"m.lokr_w1": W1, "m.lokr_w2": W2, "m.lokr_w2_a": W2}, "there twice"),
    ],
)
def test_a_damaged_adapter_is_named(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(PipeError, match=f"The adapter a.safetensors .*{said}") as raised:
        read_deltas(tensors, "The adapter a.safetensors")
    assert raised.value.exit_status == 1


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.lokr_w1": W1, "m.lokr_w2": torch.ones(3, 3, 1)}, "m.lokr_w2 is no matrix"),
        ({"m.lokr_w1": W1, "m.lokr_w2": W2, "m.dora_scale": W2}, "a tensor m.dora_scale"),
        ({"m.lora_up.weight": W1}, "a tensor m.lora_up.weight"),
    ],
)
def test_what_is_no_lokr_of_linear_layers_is_wrong_usage(
    tensors: dict[str, torch.Tensor], said: str
) -> None:
    with pytest.raises(UsageError, match=f"The adapter a.safetensors .*{said}"):
        read_deltas(tensors, "The adapter a.safetensors")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("lycoris_layers_0_self_attn_to_x", "no linear layers of this model"),
        ("lycoris_embed_tokens", "no linear layers of this model"),
        ("lycoris_patch_embedding_output_image_proj", "no linear layers of this model"),
        ("lycoris_norm", "no linear layers of this model"),
        ("lycoris_proj_out", "is 6 x 6, and this model's weight 16 x 64"),
    ],
)
def test_what_belongs_to_another_model_is_named(module: str, said: str) -> None:
    shapes = {
        "layers.0.self_attn.to_q.weight": (64, 64),
        "embed_tokens.weight": (6, 6),
        "patch_embedding.output_image_proj.weight": (64, 4, 2, 2),
        "norm.weight": (64,),
        "proj_out.weight": (16, 64),
        "proj_out.bias": (16,),
    }
    deltas = read_deltas({f"{module}.lokr_w1": W1, f"{module}.lokr_w2": W2})
    with pytest.raises(UsageError, match=f"The adapter a.safetensors .*{said}"):
        by_weight(deltas, shapes, "The adapter a.safetensors")
