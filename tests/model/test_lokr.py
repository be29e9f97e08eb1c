"""The adapter: what it attaches to, that its file is LyCORIS', and that it computes W + delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.transformer import load_transformer, predict_velocity

CPU = torch.device("cpu")
LOW_RANK = {
    "linear_dim": 3,
    "linear_alpha": 6,
    "factor": 4,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {}},
}


def _transformer(folder: Path) -> Any:
    return load_transformer(folder / "transformer", torch.float32, CPU)


def _randomise(network: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _inputs() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.8]), [[5, 6], [7]]


def test_the_guides_targets_match_both_classes(small_omnigen: Path) -> None:
    transformer = _transformer(small_omnigen)
    network = lokr.attach(transformer, LokrConfig(), seed=0)
    counts = {c.target: c for c in lokr.count_targets(transformer, network, LokrConfig())}
    assert counts["Attention"].modules == 2 * 4
    assert counts["FeedForward"].modules == 2 * 2
    assert sum(c.parameters for c in counts.values()) == sum(
        p.numel() for p in network.parameters()
    )


def test_true_size_counts_are_the_known_ones() -> None:
    """OmniGen-v1's dimensions on the meta device: 128 + 64 modules, 4.75 M and 42.5 M in all."""
    from diffusers import OmniGenTransformer2DModel

    with torch.device("meta"):
        rope = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
        transformer = OmniGenTransformer2DModel(rope_scaling=rope, pos_embed_max_size=2)
        network = lokr.attach(transformer, LokrConfig(), seed=0)
    attention, feed_forward = lokr.count_targets(transformer, network, LokrConfig())
    assert (attention.modules, feed_forward.modules) == (128, 64)
    assert round(attention.parameters / 1e6, 2) == 4.75
    assert round((attention.parameters + feed_forward.parameters) / 1e6, 1) == 42.5


def test_a_fresh_adapter_changes_nothing_and_leaves_the_base_frozen(small_omnigen: Path) -> None:
    transformer = _transformer(small_omnigen)
    x_t, t, prompts = _inputs()
    with torch.no_grad():
        before = predict_velocity(transformer, x_t, t, prompts)
        network = lokr.attach(transformer, LokrConfig(), seed=0)
        assert torch.equal(before, predict_velocity(transformer, x_t, t, prompts))
    assert not any(p.requires_grad for p in transformer.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())


def test_initial_weights_depend_on_the_seed_alone(small_omnigen: Path) -> None:
    first, again, other = (
        lokr.weights(lokr.attach(_transformer(small_omnigen), LokrConfig(), seed=s))
        for s in (4, 4, 5)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("config", [LokrConfig(), LokrConfig.model_validate(LOW_RANK)])
def test_the_output_is_that_of_weights_plus_kronecker_delta(
    small_omnigen: Path, config: LokrConfig
) -> None:
    """Against torch.kron written out: W + scale * kron(w1, w2) on a plain transformer."""
    adapted = _transformer(small_omnigen)
    network = lokr.attach(adapted, config, seed=0)
    _randomise(network)
    plain = _transformer(small_omnigen)
    tensors = lokr.weights(network)
    linears = {
        f"lycoris_{name}".replace(".", "_"): module
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    prefixes = {name.split(".")[0] for name in tensors}
    assert prefixes
    with torch.no_grad():
        for prefix in prefixes:
            part = {n.split(".")[1]: v for n, v in tensors.items() if n.startswith(prefix + ".")}
            if "lokr_w2" in part:
                w2, scale = part["lokr_w2"], 1.0
            else:
                w2 = part["lokr_w2_a"] @ part["lokr_w2_b"]
                scale = config.linear_alpha / config.linear_dim
            linears[prefix].weight += scale * torch.kron(part["lokr_w1"], w2)
        x_t, t, prompts = _inputs()
        ours = predict_velocity(adapted, x_t, t, prompts)
        merged = predict_velocity(plain, x_t, t, prompts)
        base = predict_velocity(_transformer(small_omnigen), x_t, t, prompts)
    assert (ours - merged).norm() / merged.norm() < 1e-5
    assert (ours - base).norm() / base.norm() > 1e-2


@pytest.mark.parametrize("config", [LokrConfig(), LokrConfig.model_validate(LOW_RANK)])
def test_lycoris_own_loader_reads_the_file(
    small_omnigen: Path, tmp_path: Path, config: LokrConfig
) -> None:
    from lycoris import create_lycoris_from_weights

    adapted = _transformer(small_omnigen)
    network = lokr.attach(adapted, config, seed=0)
    _randomise(network)
    path = tmp_path / "adapter.safetensors"
    lokr.save_adapter(lokr.weights(network), path, config, step="7")

    theirs = _transformer(small_omnigen)
    loaded, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    for module in loaded.loras:
        module.bypass_mode = True
    loaded.apply_to()
    x_t, t, prompts = _inputs()
    with torch.no_grad():
        difference = predict_velocity(theirs, x_t, t, prompts) - predict_velocity(
            adapted, x_t, t, prompts
        )
    assert len(loaded.loras) == len(network.loras)
    assert difference.abs().max() < 1e-5
    metadata = lokr.read_adapter(path)[1]
    assert LokrConfig.model_validate_json(metadata["lycoris_config"]) == config
    assert metadata["step"] == "7"


def test_restoring_is_exact_and_refuses_another_shape(small_omnigen: Path) -> None:
    network = lokr.attach(_transformer(small_omnigen), LokrConfig(), seed=0)
    _randomise(network)
    kept = lokr.weights(network)
    _randomise(network, seed=2)
    lokr.restore_weights(network, kept)
    assert all(torch.equal(kept[name], tensor) for name, tensor in lokr.weights(network).items())
    other = lokr.attach(_transformer(small_omnigen), LokrConfig.model_validate(LOW_RANK), seed=0)
    with pytest.raises(PipeError, match="another shape"):
        lokr.restore_weights(other, kept)


def test_a_target_that_matches_nothing_is_a_usage_error(small_omnigen: Path) -> None:
    config = LokrConfig.model_validate({"apply_preset": {"target_module": ["Attn"]}})
    with pytest.raises(UsageError, match=r"`Attn` matches nothing.*Attention.*FeedForward"):
        lokr.attach(_transformer(small_omnigen), config, seed=0)


@pytest.mark.parametrize("spelling", ["FeedForward", "OmniGenFeedForward"])
def test_the_algo_map_holds_for_either_spelling_of_a_class(
    small_omnigen: Path, spelling: str
) -> None:
    preset = {"target_module": [spelling], "module_algo_map": {"FeedForward": {"factor": 4}}}
    config = LokrConfig.model_validate({"apply_preset": preset})
    network = lokr.attach(_transformer(small_omnigen), config, seed=0)
    assert {tuple(lora.lokr_w1.shape) for lora in network.loras} == {(4, 4)}


def test_a_key_of_the_algo_map_that_is_no_class_is_a_usage_error(small_omnigen: Path) -> None:
    config = LokrConfig.model_validate({"apply_preset": {"module_algo_map": {"FeedFoward": {}}}})
    with pytest.raises(UsageError, match=r"`FeedFoward` matches nothing.*module_algo_map"):
        lokr.attach(_transformer(small_omnigen), config, seed=0)


def _excluding(*patterns: str) -> LokrConfig:
    return LokrConfig.model_validate({"apply_preset": {"exclude_name": patterns}})


def _depth(blocks: int) -> Any:
    from diffusers import OmniGenTransformer2DModel

    rope = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    with torch.device("meta"):
        return OmniGenTransformer2DModel(rope_scaling=rope, pos_embed_max_size=2, num_layers=blocks)


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ([r"layers\.1"], [n for n in range(12) if n != 1]),  # not 10 and 11
        ([r"layers\.[0-9]"], [10, 11]),
        ([r"layers\.0", r"layers\.1[01]"], list(range(1, 10))),
    ],
)
def test_excluded_blocks_stay_as_they_are_and_no_other(
    patterns: list[str], kept: list[int]
) -> None:
    with torch.device("meta"):
        network = lokr.attach(_depth(12), _excluding(*patterns), seed=0)
    blocks = {int(lora.lora_name.split("_layers_")[1].split("_")[0]) for lora in network.loras}
    assert sorted(blocks) == kept
    assert len(network.loras) == 6 * len(kept)


def test_one_layer_of_every_block_can_be_excluded() -> None:
    transformer, config = _depth(2), _excluding(r".*\.down_proj")
    with torch.device("meta"):
        network = lokr.attach(transformer, config, seed=0)
    assert [c.modules for c in lokr.count_targets(transformer, network, config)] == [8, 2]
    assert not any("down_proj" in lora.lora_name for lora in network.loras)


def test_an_adapter_with_excluded_blocks_is_attached_again_as_it_was(
    small_omnigen: Path, tmp_path: Path
) -> None:
    config = _excluding(r"layers\.0")
    network = lokr.attach(transformer := _transformer(small_omnigen), config, seed=0)
    _randomise(network)
    lokr.save_adapter(lokr.weights(network), tmp_path / "adapter.safetensors", config)
    again = _transformer(small_omnigen)
    lokr.attach_file(again, tmp_path / "adapter.safetensors")
    x_t, t, prompts = _inputs()
    with torch.no_grad():
        drawn = predict_velocity(transformer, x_t, t, prompts)
        assert torch.equal(drawn, predict_velocity(again, x_t, t, prompts))
        assert not torch.equal(
            drawn, predict_velocity(_transformer(small_omnigen), x_t, t, prompts)
        )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([r"layers\.7"], r"exclude_name `layers\\.7` matches none of the 12 linear layers"),
        ([r".*\.mlp"], r"leaves nothing of the LoKr target `FeedForward`"),
    ],
)
def test_an_exclusion_of_nothing_or_of_all_is_a_usage_error(
    patterns: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        lokr.check_targets(_depth(2), _excluding(*patterns))


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        _excluding("layers.[")


def test_modules_of_nested_or_repeated_targets_count_once(small_omnigen: Path) -> None:
    names = ["FeedForward", "OmniGenFeedForward", "OmniGenBlock"]
    config = LokrConfig.model_validate({"apply_preset": {"target_module": names}})
    transformer = _transformer(small_omnigen)
    network = lokr.attach(transformer, config, seed=0)
    counts = [c.modules for c in lokr.count_targets(transformer, network, config)]
    assert counts == [4, 0, 8]
    assert len(network.loras) == 12


def test_a_class_only_in_the_algo_map_is_not_adapted(small_omnigen: Path) -> None:
    """The guide says FeedForward may be taken out of the targets; its map entry may stay."""
    config = LokrConfig.model_validate({"apply_preset": {"target_module": ["Attention"]}})
    transformer = _transformer(small_omnigen)
    network = lokr.attach(transformer, config, seed=0)
    assert len(network.loras) == 2 * 4


def test_a_damaged_adapter_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(PipeError, match=r"adapter\.safetensors"):
        lokr.read_adapter(path)


@pytest.mark.parametrize("config", [LokrConfig(), LokrConfig.model_validate(LOW_RANK)])
def test_the_forward_pass_is_lycoris_own(
    small_omnigen: Path, config: LokrConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is arranged otherwise: LyCORIS' own chain is the reference, also for gradients."""
    outputs, gradients = [], []
    for own in (True, False):
        transformer = _transformer(small_omnigen)
        network = lokr.attach(transformer, config, seed=0)
        _randomise(network)
        for lora in network.loras:
            if own:
                monkeypatch.setattr(lora, "bypass_forward", type(lora).bypass_forward.__get__(lora))
        x_t, t, prompts = _inputs()
        output = predict_velocity(transformer, x_t, t, prompts)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_at_strength_zero_the_factors_are_not_computed(
    small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = _transformer(small_omnigen)
    network = lokr.attach(transformer, LokrConfig(), seed=0)
    _randomise(network)
    calls = []
    original = lokr.kronecker_linear

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(lokr, "kronecker_linear", counted)
    x_t, t, prompts = _inputs()
    with torch.no_grad():
        network.set_multiplier(0.0)
        at_zero = predict_velocity(transformer, x_t, t, prompts)
        assert calls == []
        base = predict_velocity(_transformer(small_omnigen), x_t, t, prompts)
        assert torch.equal(at_zero, base)
        network.set_multiplier(1.0)
        assert not torch.equal(predict_velocity(transformer, x_t, t, prompts), base)
    assert len(calls) == len(network.loras)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    """safetensors itself leaves the order of the metadata to chance."""
    tensors = {name: torch.full((3, 2), 0.5) for name in ("b", "a", "c")}
    metadata = {f"key{number}": str(number) for number in range(20)}
    files = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        lokr.save_adapter(tensors, path, LokrConfig(), **metadata)
        files.add(path.read_bytes())
    assert len(files) == 1
    read, found = lokr.read_adapter(path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert metadata.items() <= found.items()


def test_an_adapter_of_another_program_is_pointed_to_export(tmp_path: Path) -> None:
    """Its configuration has keys that ours has not, or there is none: it cannot be attached."""
    file = tmp_path / "a.safetensors"
    theirs = {"lycoris_config": '{"algo": "lokr", "multiplier": 1.0, "bypass_mode": true}'}
    for metadata in (None, theirs):
        save_file({"lycoris_proj_out.lokr_w1": torch.ones(1, 1)}, file, metadata=metadata)
        with pytest.raises(PipeError, match=r"`omnigen-pipe export`.*`omnigen-pipe generate --mod"):
            lokr.adapter_config(file)


def test_numbers_that_are_not_finite_are_damage_only_where_they_count(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path, one, nan = tmp_path / "a.safetensors", torch.ones(2, 2), torch.tensor(float("nan"))
    low = {"m.lokr_w1": one, "m.lokr_w2_a": one + 1, "m.lokr_w2_b": one + 2}
    save_file({"m.lokr_w1": one * nan, "m.lokr_w2": one}, path)
    with pytest.raises(PipeError, match=r"is damaged: m\.lokr_w1 holds numbers that are not fin"):
        lokr.read_adapter(path)
    save_file({**low, "m.alpha": nan}, path)
    with pytest.raises(PipeError, match=r"is damaged: m\.alpha holds"):
        lokr.read_adapter(path)
    save_file({"m.lokr_w1": one, "m.lokr_w2": one + 1, "m.alpha": nan}, path)
    assert len(lokr.read_adapter(path)[0]) == 3, "full matrices are not scaled"
