"""Our rows, computed together, equal diffusers' own model run one sample at a time."""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import OmniGenTransformer2DModel
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from manifests.errors import UsageError
from omnigen_pipe.model.attention import by_spans, spans
from omnigen_pipe.model.transformer import load_transformer, predict_velocity

CPU = torch.device("cpu")


def _reference(model: Any, x_t: torch.Tensor, t: torch.Tensor, prompt: list[int]) -> torch.Tensor:
    """diffusers' model on one sample, with its own collator's mask and positions."""
    collator = OmniGenCollator(hidden_size=model.config.hidden_size)
    size = [x_t.shape[-2] * 8, x_t.shape[-1] * 8]
    features = [{"input_ids": list(prompt), "pixel_values": None, "image_sizes": None}]
    ids, positions, mask, _, _, sizes = collator.process_mllm_input(features, [size])
    return model(
        hidden_states=x_t,
        timestep=t,
        input_ids=ids,
        input_img_latents=[],
        input_image_sizes=sizes,
        attention_mask=mask,
        position_ids=positions,
        return_dict=False,
    )[0]


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def stock(small_omnigen: Path) -> Any:
    return OmniGenTransformer2DModel.from_pretrained(small_omnigen / "transformer").eval()


@pytest.fixture(scope="module")
def ours(small_omnigen: Path) -> Any:
    return load_transformer(small_omnigen / "transformer", torch.float32, CPU).eval()


def _batch(
    lengths: list[int], height: int = 8, width: int = 12
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * len(lengths))
    x_t = torch.randn(len(lengths), 4, height, width, generator=generator)
    t = torch.rand(len(lengths), generator=generator)
    prompts = [torch.randint(3, 450, (n,), generator=generator).tolist() for n in lengths]
    return x_t, t, prompts


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_every_row_equals_diffusers_alone(ours: Any, stock: Any, lengths: list[int]) -> None:
    x_t, t, prompts = _batch(lengths)
    with torch.no_grad():
        together = predict_velocity(ours, x_t, t, prompts)
        for row, prompt in enumerate(prompts):
            alone = _reference(stock, x_t[row : row + 1], t[row : row + 1], prompt)
            assert _relative_error(together[row : row + 1], alone) < 1e-5


def test_diffusers_own_batch_is_what_this_avoids(ours: Any, stock: Any) -> None:
    """The fault is there: with the shorter prompt first, diffusers' second row is wrong."""
    x_t, t, prompts = _batch([12, 90])
    collator = OmniGenCollator(hidden_size=stock.config.hidden_size)
    features = [{"input_ids": p, "pixel_values": None, "image_sizes": None} for p in prompts]
    ids, positions, mask, _, _, sizes = collator.process_mllm_input(features, [[64, 96]] * 2)
    with torch.no_grad():
        batched = stock(x_t, t, ids, [], sizes, mask, positions, return_dict=False)[0]
        alone = _reference(stock, x_t[1:], t[1:], prompts[1])
        rowwise = predict_velocity(ours, x_t, t, prompts)
    assert _relative_error(batched[1:], alone) > 1e-3
    assert _relative_error(rowwise[1:], alone) < 1e-5


def test_each_row_picks_its_own_factor_table(ours: Any, stock: Any) -> None:
    """Rows on both sides of 4096 positions: 4032 image tokens turn long at 64 prompt tokens."""
    x_t, t, prompts = _batch([63, 64, 10], height=112, width=144)
    with torch.no_grad():
        together = predict_velocity(ours, x_t, t, prompts)
        for row, prompt in enumerate(prompts):
            alone = _reference(stock, x_t[row : row + 1], t[row : row + 1], prompt)
            assert _relative_error(together[row : row + 1], alone) < 1e-5


@pytest.mark.parametrize(
    ("lengths", "checkpointing"),
    [([31, 7, 19], False), ([31, 7, 19], True), ([9, 30, 9, 30, 4], False)],
)
def test_gradients_equal_diffusers_one_by_one(
    small_omnigen: Path, stock: Any, lengths: list[int], checkpointing: bool
) -> None:
    model = load_transformer(small_omnigen / "transformer", torch.float32, CPU)
    for trained in (model, stock):
        trained.requires_grad_(True)
        trained.zero_grad()
    if checkpointing:
        model.enable_gradient_checkpointing()
    x_t, t, prompts = _batch(lengths)
    wanted = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    (predict_velocity(model, x_t, t, prompts) - wanted).square().sum().backward()
    for row, prompt in enumerate(prompts):
        velocity = _reference(stock, x_t[row : row + 1], t[row : row + 1], prompt)
        (velocity - wanted[row : row + 1]).square().sum().backward()
    theirs = dict(stock.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if theirs[name].grad is not None:
            assert _relative_error(parameter.grad, theirs[name].grad) < 1e-5, name
            compared += 1
    stock.requires_grad_(False)
    assert compared > 20


def test_prompts_of_one_length_are_computed_as_neighbours(ours: Any) -> None:
    """Whatever order they come in: each length is cut off once, not each row."""
    x_t, t, prompts = _batch([9, 30, 9, 30, 4])
    seen = []
    hook = ours.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        predict_velocity(ours, x_t, t, prompts)
    hook.remove()
    (span,) = seen
    assert [(row, len(list(same))) for row, same in groupby(span.rows)] == [
        ((26, 31), 1),
        ((21, 31), 2),
        ((0, 31), 2),
    ]


def test_rows_come_in_any_order() -> None:
    """Diffusers' pipeline hands over rows as they are; the reference is one dense mask."""
    generator = torch.Generator().manual_seed(3)
    lengths, image = [9, 5, 9, 2], 6
    total = max(lengths) + 1 + image
    query, key, value = (torch.randn(4, 2, total, 8, generator=generator) for _ in range(3))
    seen = torch.zeros(4, 1, total, total, dtype=torch.bool)
    for row, (start, first) in enumerate(spans(lengths).rows):
        seen[row, 0, start:first, start:first] = torch.ones(first - start, first - start).tril() > 0
        seen[row, 0, first:, start:] = True
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    ours = by_spans(query, key, value, spans(lengths))
    for row, (start, _) in enumerate(spans(lengths).rows):
        assert _relative_error(ours[row, :, start:], dense[row, :, start:]) < 1e-5
        assert not ours[row, :, :start].any()


def test_grouped_key_value_heads_work(stock: Any) -> None:
    from omnigen_pipe.model.transformer import rowwise

    config = {**stock.config, "num_attention_heads": 4, "num_key_value_heads": 2}
    config["rope_scaling"] = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    torch.manual_seed(3)
    model = rowwise(OmniGenTransformer2DModel.from_config(config).eval())
    x_t, t, prompts = _batch([9, 4])
    with torch.no_grad():
        together = predict_velocity(model, x_t, t, prompts)
        alone = torch.cat(
            [
                predict_velocity(model, x_t[i : i + 1], t[i : i + 1], prompts[i : i + 1])
                for i in (0, 1)
            ]
        )
    assert together.isfinite().all()
    assert _relative_error(together, alone) < 1e-5


def test_weights_that_are_not_all_there_are_named(small_omnigen: Path, tmp_path: Path) -> None:
    """diffusers itself only warns, and trains on with what is left uninitialised."""
    folder = tmp_path / "transformer"
    shutil.copytree(small_omnigen / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["layers.1.self_attn.to_q.weight"]
    save_file(weights, file)
    with pytest.raises(UsageError, match=r"1 tensors are missing.*layers\.1\.self_attn\.to_q"):
        load_transformer(folder, torch.float32, torch.device("cpu"))
