"""What our pipeline draws equals what diffusers draws, wherever diffusers is right."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from diffusers.pipelines.omnigen.processor_omnigen import (
    OmniGenCollator,
    OmniGenMultiModalProcessor,
)
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.latents.vae import load_tiny
from omnigen_pipe.model import lokr
from omnigen_pipe.model.attention import Spans
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.prompts import tokenizer as tokenizers
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT, render
from omnigen_pipe.sampling.pipeline import (
    PromptProcessor,
    build_pipeline,
    draw,
    draw_latents,
    load_scheduler,
    preview,
    set_strength,
)
from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.sampling.source import Source
from small_tiny import build_small_tiny

CPU = torch.device("cpu")
SHORT = "a red circle"
OTHER = "a small green triangle above a yellow star on a black background"
#: Longer than the negative prompt, which diffusers gets right only then.
LONG = f"{DIFFUSERS_NEGATIVE_PROMPT} {DIFFUSERS_NEGATIVE_PROMPT}"
SETTINGS = Settings(width=48, height=32, num_inference_steps=3, guidance_scale=2.5)


@pytest.fixture(scope="module")
def ours(small_omnigen: Path) -> Any:
    source = Source(str(small_omnigen), Path("/"))
    return source.pipeline(source.tokenizer(), CPU, torch.float32)


@pytest.fixture(scope="module")
def theirs(small_omnigen: Path) -> Any:
    """diffusers' pipeline with nothing of ours in it."""
    pipe = OmniGenPipeline(
        transformer=OmniGenTransformer2DModel.from_pretrained(small_omnigen / "transformer"),
        vae=AutoencoderKL.from_pretrained(small_omnigen / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(small_omnigen / "scheduler"),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(small_omnigen / "tokenizer" / "tokenizer.json")
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, *wanted: tuple[str, int], **changes: object) -> list[np.ndarray]:
    """Pictures of prompts and seeds, drawn by us as one batch, as float arrays."""
    settings = SETTINGS.changed(changes, "test")
    requests = [Request("x", prompt, seed) for prompt, seed in wanted]
    pictures = draw(pipe, requests, settings, nullcontext())
    return [levels(picture) for picture in pictures]


def levels(picture: Image.Image | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(picture).astype(float)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for rounding to one of 256 levels, and not for want of anything in them."""
    assert one.std() > 5
    return one.shape == other.shape and bool(np.abs(one - other).max() <= 1)


def test_tokens_are_those_of_diffusers_tokenizer(theirs: Any, small_omnigen: Path) -> None:
    tokenizer = tokenizers.load(small_omnigen / "tokenizer")
    texts = [SHORT, LONG, "", "<cfg> naïve 日本"]
    their_ids = [theirs.tokenizer(render(text)).input_ids for text in texts]
    assert tokenizer.encode(texts) == their_ids


@pytest.mark.parametrize("which", ["small", "phi3"])
def test_rows_are_laid_out_as_by_diffusers_collator(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Ids and positions of prompts and negative prompts; the mask alone is none."""
    if which == "small":
        folder = request.getfixturevalue("small_omnigen") / "tokenizer"
    else:
        folder = request.getfixturevalue("phi3_tokenizer")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = OmniGenMultiModalProcessor(
        lambda text: SimpleNamespace(input_ids=plain.encode(text).ids)
    )
    processor = PromptProcessor(tokenizers.load(folder), 16)
    processor.negative_prompt = DIFFUSERS_NEGATIVE_PROMPT
    sizes = {"height": 64, "width": 96, "num_images_per_prompt": 2}
    for prompts in ([SHORT], [OTHER, SHORT], [SHORT, LONG, OTHER]):
        mine = processor(prompts, None, **sizes, use_img_cfg=False)
        stock = reference(prompts, None, **sizes, use_img_cfg=False)
        assert torch.equal(mine["input_ids"], stock["input_ids"])
        assert torch.equal(mine["position_ids"], stock["position_ids"])
        assert isinstance(mine["attention_mask"].to(CPU), Spans)
        assert len(mine["attention_mask"].rows) == len(stock["attention_mask"])


@pytest.mark.parametrize("prompts", [[LONG], [LONG, LONG], [LONG, SHORT]])
def test_pictures_are_diffusers_where_its_first_row_is_the_longest(
    ours: Any, theirs: Any, prompts: list[str]
) -> None:
    seeds = range(3, 3 + len(prompts))
    sizes = {"height": SETTINGS.height, "width": SETTINGS.width}
    options: Any = {**sizes, "num_inference_steps": 3, "guidance_scale": 2.5}

    def latents(pipe: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, output_type="latent", **options).images

    ours.multimodal_processor.negative_prompt = DIFFUSERS_NEGATIVE_PROMPT
    assert float((latents(ours) - latents(theirs)).abs().max()) < 1e-4
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stock = theirs(prompts, generator=generators, **options).images
    mine = drawn(ours, *zip(prompts, seeds, strict=True))
    assert all(same(one, levels(other)) for one, other in zip(mine, stock, strict=True))


def _alone(theirs: Any, prompt: str, seed: int, settings: Settings) -> np.ndarray:
    """A picture by Euler's steps written out, each row of guidance a pass of its own through
    diffusers' unmodified model: so no row has neighbours."""
    collator = OmniGenCollator()
    size = [settings.height, settings.width]
    rows = []
    for text in (prompt, settings.negative_prompt):
        ids = theirs.tokenizer(render(text)).input_ids
        features = [{"input_ids": ids, "pixel_values": None, "image_sizes": None}]
        rows.append(collator.process_mllm_input(features, [size]))
    shape = (1, 4, settings.height // 8, settings.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    steps = settings.num_inference_steps
    with torch.no_grad():
        for step in range(steps):
            t = torch.tensor([step / steps])
            wanted, unwanted = (
                theirs.transformer(x, t, ids, [], sizes, mask, positions, return_dict=False)[0]
                for ids, positions, mask, _, _, sizes in rows
            )
            x = x + (unwanted + settings.guidance_scale * (wanted - unwanted)) / steps
        decoded = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample[0]
    scaled = (decoded.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().numpy().astype(float)


def test_pictures_of_mixed_lengths_are_those_drawn_alone_by_diffusers_model(
    ours: Any, theirs: Any
) -> None:
    wanted = [(SHORT, 5), (LONG, 6), (OTHER, 7), ("", 8)]
    for negative in ("blurry", DIFFUSERS_NEGATIVE_PROMPT):
        together = drawn(ours, *wanted, negative_prompt=negative)
        settings = SETTINGS.changed({"negative_prompt": negative}, "test")
        for picture, (prompt, seed) in zip(together, wanted, strict=True):
            assert same(picture, _alone(theirs, prompt, seed, settings))


def test_diffusers_own_pipeline_is_wrong_where_a_prompt_is_short(theirs: Any) -> None:
    """The fault that ours avoids is there."""
    options: Any = {"height": SETTINGS.height, "width": SETTINGS.width, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(5)
    (picture,) = theirs(SHORT, generator=generator, guidance_scale=2.5, **options).images
    assert not same(_alone(theirs, SHORT, 5, SETTINGS), levels(picture))


def test_a_picture_depends_on_neither_batch_nor_neighbours(ours: Any) -> None:
    wanted = [(SHORT, 1), (LONG, 2), (OTHER, 3)]
    together = drawn(ours, *wanted)
    backwards = drawn(ours, *wanted[::-1])[::-1]
    for one, two, alone in zip(together, backwards, wanted, strict=True):
        (single,) = drawn(ours, alone)
        assert same(one, single)
        assert same(two, single)


def test_seeds_reproduce_and_differ(ours: Any) -> None:
    (first,), (again,), (other,) = (drawn(ours, (SHORT, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 5


def test_the_negative_prompt_counts_with_guidance_and_only_then(ours: Any) -> None:
    def pair(guidance: float) -> list[np.ndarray]:
        return [
            drawn(ours, (SHORT, 1), negative_prompt=text, guidance_scale=guidance)[0]
            for text in ("", "a blue square")
        ]

    guided, unguided = pair(2.5), pair(1.0)
    assert not same(*guided)
    assert same(*unguided)


def test_nothing_stays_behind_in_the_transformer(small_omnigen: Path, ours: Any) -> None:
    """Training draws in between: afterwards its model must be what it was."""
    transformer = load_transformer(small_omnigen / "transformer", torch.bfloat16, CPU)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    tokenizer = ours.multimodal_processor.tokenizer
    drawn(build_pipeline(transformer, ours.vae, ours.scheduler, tokenizer), (SHORT, 1))
    assert not transformer._forward_hooks
    after = transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_latents_are_not_rounded_to_the_models_precision(small_omnigen: Path, ours: Any) -> None:
    """diffusers' own are, in bfloat16 at each of 50 steps, and end many times as far away."""
    source = Source(str(small_omnigen), Path("/"))
    half = source.pipeline(source.tokenizer(), CPU, torch.bfloat16)
    assert half.vae.dtype == torch.float32
    settings = SETTINGS.changed({"num_inference_steps": 50}, "test")
    request = [Request("x", SHORT, 1)]
    exact = draw_latents(ours, request, settings, nullcontext())
    mine = draw_latents(half, request, settings, torch.autocast("cpu", dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = half(
            SHORT,
            height=settings.height,
            width=settings.width,
            num_inference_steps=50,
            generator=[torch.Generator().manual_seed(1)],
            output_type="latent",
        ).images
    assert (mine.dtype, stock.dtype) == (torch.float32, torch.bfloat16)
    assert float((mine - exact).norm()) < 0.2 * float((stock.float() - exact).norm())
    assert float((mine - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize(
    "config",
    [
        LokrConfig(multiplier=0.5),
        LokrConfig.model_validate({"linear_dim": 3, "linear_alpha": 6, "factor": 4}),
    ],
    ids=["full", "low-rank"],
)
def test_an_adapter_at_full_strength_is_the_merged_model_and_at_none_the_base(
    small_omnigen: Path, tmp_path: Path, ours: Any, config: LokrConfig
) -> None:
    network = lokr.attach(_transformer(small_omnigen), config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    file = tmp_path / "adapter.safetensors"
    tensors = lokr.weights(network)
    lokr.save_adapter(tensors, file, config)

    merged = _transformer(small_omnigen)
    changed = _merge(merged, tensors, config.multiplier)
    assert changed == 12
    tokenizer = ours.multimodal_processor.tokenizer
    wanted = ((SHORT, 1), (LONG, 2))
    expected = drawn(build_pipeline(merged, ours.vae, ours.scheduler, tokenizer), *wanted)
    base = drawn(ours, *wanted)

    source = Source(str(small_omnigen), Path("/"))
    for strength, reference in ((1.0, expected), (0.0, base)):
        pipe = source.pipeline(tokenizer, CPU, torch.float32, file, strength)
        pictures = drawn(pipe, *wanted)
        assert all(same(one, two) for one, two in zip(pictures, reference, strict=True))
    assert not same(expected[0], base[0])


def _transformer(folder: Path) -> Any:
    return load_transformer(folder / "transformer", torch.float32, CPU)


def _merge(transformer: Any, tensors: dict[str, torch.Tensor], multiplier: float) -> int:
    """W + multiplier * scale * kron(w1, w2) in every adapted layer; how many there were."""
    count = 0
    for name, module in transformer.named_modules():
        key = f"lycoris_{name}".replace(".", "_")
        part = {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
        if not part:
            continue
        if "lokr_w2" in part:
            w2, scale = part["lokr_w2"], 1.0
        else:
            w2 = part["lokr_w2_a"] @ part["lokr_w2_b"]
            scale = float(part["alpha"]) / len(part["lokr_w2_b"])
        module.weight.data += multiplier * scale * torch.kron(part["lokr_w1"], w2)
        count += 1
    return count


def _adapter(folder: Path, file: Path, config: LokrConfig, size: float) -> Path:
    """Write an adapter for the model in `folder`, of random factors of that size, as `file`."""
    network = lokr.attach(_transformer(folder), config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    lokr.save_adapter(lokr.weights(network), file, config)
    return file


def test_the_strength_can_be_changed_between_pictures(small_omnigen: Path, tmp_path: Path) -> None:
    """Each is that of a pipeline of that strength from the start, in whatever order."""
    config = LokrConfig(multiplier=0.5)
    file = _adapter(small_omnigen, tmp_path / "adapter.safetensors", config, 0.1)
    source = Source(str(small_omnigen), Path("/"))
    tokenizer = source.tokenizer()
    changing = source.pipeline(tokenizer, CPU, torch.float32, file, 7.0)
    for strength in (1.0, 0.0, 0.4):
        set_strength(changing, strength)
        fresh = source.pipeline(tokenizer, CPU, torch.float32, file, strength)
        (one,), (other,) = (drawn(pipe, (SHORT, 1)) for pipe in (changing, fresh))
        assert np.array_equal(one, other)


@pytest.mark.parametrize("base", ["no_change", "int8-torchao"])
def test_half_precision_and_fewer_bits_draw_nearly_the_same(
    small_omnigen: Path, tmp_path: Path, ours: Any, base: str
) -> None:
    """What a GPU draws with an adapter, and what a base model in fewer bits does."""
    file = _adapter(small_omnigen, tmp_path / "adapter.safetensors", LokrConfig(), 0.2)
    source = Source(str(small_omnigen), Path("/"))
    tokenizer = source.tokenizer()
    request = [Request("x", SHORT, 1)]

    def latents(dtype: torch.dtype, adapter: Path | None, base: str) -> torch.Tensor:
        pipe = source.pipeline(tokenizer, CPU, dtype, adapter, base_precision=base)
        autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        return draw_latents(pipe, request, SETTINGS, autocast)

    exact = latents(torch.float32, file, "no_change")
    plain = draw_latents(ours, request, SETTINGS, nullcontext())
    half = latents(torch.bfloat16, file, base)
    assert half.dtype == torch.float32
    assert float((half - exact).norm()) < 0.1 * float((plain - exact).norm())
    assert 0 < float((half - exact).norm() / exact.norm()) < 0.05


def test_pictures_are_decoded_without_tf32(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, allowed = ours.vae.decode, []

    def decode(*args: Any, **options: Any) -> Any:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return plain(*args, **options)

    monkeypatch.setattr(ours.vae, "decode", decode)
    drawn(ours, (SHORT, 1))
    assert allowed == [False]


def _short_of_memory(vae: Any, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Let the decoder of `vae` have memory for latents of at most `limit` a side."""
    plain = vae.decoder.forward

    def decode(latent: torch.Tensor, *rest: Any) -> Any:
        if max(latent.shape[-2:]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(latent, *rest)

    monkeypatch.setattr(vae.decoder, "forward", decode)


def test_a_picture_that_is_too_large_to_decode_is_decoded_in_tiles(
    small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as diffusers' own tiling, and said once."""
    source = Source(str(small_omnigen), Path("/"))
    pipe = source.pipeline(source.tokenizer(), CPU, torch.float32)
    settings = SETTINGS.changed({"width": 576, "num_inference_steps": 1}, "test")
    requests = [Request("x", SHORT, seed) for seed in (1, 2)]
    whole = [levels(picture) for picture in draw(pipe, requests, settings, nullcontext())]
    _short_of_memory(pipe.vae, monkeypatch, 64)
    said: list[str] = []
    tiled = draw(pipe, requests, settings, nullcontext(), say=said.append)
    assert len(said) == 1
    assert "in tiles of 512 px" in said[0]
    reference = AutoencoderKL.from_pretrained(small_omnigen / "vae")
    reference.enable_tiling()
    reference.tile_sample_min_size, reference.tile_latent_min_size = 512, 64
    latents = draw_latents(pipe, requests, settings, nullcontext())
    with torch.no_grad():
        decoded = reference.decode(latents[:1] / reference.config.scaling_factor).sample
    (expected,) = pipe.image_processor.postprocess(decoded, output_type="pil")
    assert same(levels(tiled[0]), levels(expected))
    assert np.abs(levels(tiled[1]) - whole[1]).mean() < 3


def test_without_memory_for_a_tile_drawing_fails_and_says_what_to_do(
    small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(str(small_omnigen), Path("/"))
    pipe = source.pipeline(source.tokenizer(), CPU, torch.float32)
    _short_of_memory(pipe.vae, monkeypatch, 0)
    with pytest.raises(PipeError, match="out of memory at one picture, 48x32 pixels"):
        draw(pipe, [Request("x", SHORT, 1)], SETTINGS, nullcontext())


@pytest.mark.parametrize(
    ("dtype", "base", "remedy"),
    [
        (torch.float32, "no_change", "use --precision fp16, or use --base-model-precision"),
        (torch.bfloat16, "no_change", "To mend that, use --base-model-precision"),
        (torch.bfloat16, "int8-torchao", "To mend that, free memory"),
    ],
)
def test_a_model_that_does_not_fit_into_memory_says_what_to_do(
    small_omnigen: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    base: str,
    remedy: str,
) -> None:
    """The CPU stands for a GPU without bfloat16."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("omnigen_pipe.model.transformer.load_transformer", full)
    source = Source(str(small_omnigen), Path("/"))
    with pytest.raises(PipeError, match=f"too little memory for omnigen.*{remedy}"):
        source.pipeline(source.tokenizer(), CPU, dtype, base_precision=base)


def test_an_adapter_of_another_model_is_refused(small_omnigen: Path, tmp_path: Path) -> None:
    config = LokrConfig()
    network = lokr.attach(_transformer(small_omnigen), config, seed=0)
    tensors = {name: t[..., :1].clone() for name, t in lokr.weights(network).items() if t.ndim}
    file = tmp_path / "adapter.safetensors"
    lokr.save_adapter(tensors, file, config)
    with pytest.raises(UsageError, match="does not fit this model"):
        lokr.attach_file(_transformer(small_omnigen), file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(PipeError, match="not a whole safetensors file"):
        lokr.attach_file(_transformer(small_omnigen), file)


def test_a_picture_that_is_not_finite_is_none(small_omnigen: Path, ours: Any) -> None:
    broken = _transformer(small_omnigen)
    broken.proj_out.weight.data[0, 0] = float("inf")
    tokenizer = ours.multimodal_processor.tokenizer
    pipe = build_pipeline(broken, ours.vae, ours.scheduler, tokenizer)
    assert draw(pipe, [Request("x", SHORT, 1)], SETTINGS, nullcontext()) == [None]


@pytest.mark.parametrize("change", [{"invert_sigmas": False}, {"num_train_timesteps": 1000}])
def test_another_scheduler_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"invert_sigmas": True, "num_train_timesteps": 1, **change}
    FlowMatchEulerDiscreteScheduler(**options).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is not OmniGen's"):
        load_scheduler(tmp_path)


def test_a_folder_without_a_scheduler_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_scheduler(tmp_path)


def _estimated(pipe: Any, settings: Settings) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the picture of SHORT would be after each step, and what it is."""
    estimates: dict[int, torch.Tensor] = {}
    request = [Request("x", SHORT, 1)]
    latents = draw_latents(
        pipe, request, settings, nullcontext(), on_estimate=estimates.__setitem__
    )
    assert list(estimates) == list(range(1, settings.num_inference_steps + 1))
    return list(estimates.values()), latents


def test_with_the_true_velocity_every_estimate_is_the_clean_latent(
    small_omnigen: Path, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 4, SETTINGS.height // 8, SETTINGS.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    transformer = _transformer(small_omnigen)
    velocity = torch.cat([clean - noise] * 2)
    monkeypatch.setattr(transformer, "forward", lambda **_: (velocity,))
    tokenizer = ours.multimodal_processor.tokenizer
    pipe = build_pipeline(transformer, ours.vae, ours.scheduler, tokenizer)
    estimates, latents = _estimated(pipe, SETTINGS)
    for estimate in [*estimates, latents]:
        assert torch.allclose(estimate, clean, atol=1e-5)


def test_an_estimate_goes_all_the_way_with_the_guided_velocity(ours: Any) -> None:
    """x_t + (1 - t) v, of what the model was given and said; and nothing changes by it."""
    expected = []

    def recorded(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        x = inputs["hidden_states"].chunk(2)[0]
        wanted, unwanted = output[0].chunk(2)
        guided = unwanted + SETTINGS.guidance_scale * (wanted - unwanted)
        expected.append(x + (1 - inputs["timestep"][0]) * guided)

    handle = ours.transformer.register_forward_hook(recorded, with_kwargs=True)
    estimates, latents = _estimated(ours, SETTINGS)
    handle.remove()
    for one, other in zip(estimates, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(estimates[-1], latents)
    assert float((estimates[0] - latents).abs().max()) > 0.01
    alone = draw_latents(ours, [Request("x", SHORT, 1)], SETTINGS, nullcontext())
    assert torch.equal(latents, alone)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_preview_is_what_diffusers_tiny_decoder_makes_of_a_latent(
    tmp_path: Path, factor: float
) -> None:
    """In float32, also where a training draws in bfloat16."""
    folder = build_small_tiny(tmp_path / "tiny", scaling_factor=factor)
    latent = torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(1))
    tiny = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        decoded = tiny.decode(latent[None] / factor).sample[0]
    expected = ((decoded.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = preview(load_tiny(folder), latent)
    assert np.array_equal(levels(found), expected)
    assert levels(found).shape == (32, 48, 3)
    assert preview(load_tiny(folder), latent * torch.nan) is None
