"""Exports compute what the adapted model computes, whoever reads them, and lose no tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import AuthorsModel
from blake3 import blake3
from exported import CONFIG, CPU, adapted, inputs, relative, velocity, write_adapter
from pipeline_project import COMMAND, Project, configured
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_stub import COMMIT, environment, serve
from manifests.errors import PipeError, UsageError
from manifests.keys import key
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.export.exporting import run
from omnigen_pipe.export.layouts import Layout
from omnigen_pipe.model import lokr
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.model_files import Model
from omnigen_pipe.progress import Progress
from omnigen_pipe.sampling.pipeline import draw_latents
from omnigen_pipe.sampling.requests import Request
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.summary import Summary

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def _export(adapter: Path, folder: Path, model: Path, **options: Any) -> Summary:
    return run(adapter, folder, Progress(quiet=True), base=Model(str(model), Path("/")), **options)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def stored_as_bf16(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Path:
    """The small model with its transformer stored in bfloat16, as the true one is."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(small_omnigen, folder)
    state = {n: t.to(torch.bfloat16) for n, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("limit", [None, 60_000])
def test_the_diffusers_folder_computes_what_the_adapted_model_does(
    small_omnigen: Path, adapter: Path, tmp_path: Path, strength: float, limit: int | None
) -> None:
    """Read by diffusers' `from_pretrained`, in one file and in several."""
    summary = _export(adapter, tmp_path / "out", small_omnigen, strength=strength, limit=limit)
    merged = load_transformer(tmp_path / "out" / "transformer", torch.float32, CPU)
    expected = velocity(adapted(small_omnigen, adapter, strength))
    assert relative(velocity(merged), expected) < 1e-5
    files = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) == summary.counts["weight files"]
    assert (len(files) > 5) == (limit is not None)
    wanted = dict(load_file(small_omnigen / WEIGHTS))
    found = {name: t for file in files for name, t in load_file(file).items()}
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}


def test_a_pipeline_can_be_made_of_the_diffusers_folder(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """Its transformer holds the base's tensors, the adapted ones with their changes, and it draws
    what our own pipeline with the adapter beside the base draws."""
    from diffusers import OmniGenPipeline

    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    own = {"num_inference_steps": 1, "width": 32, "height": 48}
    (model / "generation.json").write_text(json.dumps(own))
    _export(adapter, tmp_path / "out", model)
    pipeline = OmniGenPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    expected = load_file(small_omnigen / WEIGHTS)
    for name, module in adapted(small_omnigen, adapter).named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("layers."):
            with torch.no_grad():  # a layer is linear: of the unit vectors it makes its matrix
                expected[f"{name}.weight"] = module(torch.eye(module.in_features)).T
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)

    source = Source(str(tmp_path / "out"), Path("/"))
    settings = source.settings()
    assert {key: getattr(settings, key) for key in own} == own
    request = Request("x", "a red circle", 3)
    beside = Source(str(small_omnigen), Path("/"))
    pipes = {
        "merged": source.pipeline(source.tokenizer(), CPU, torch.float32),
        "beside": beside.pipeline(beside.tokenizer(), CPU, torch.float32, adapter),
        "base": beside.pipeline(beside.tokenizer(), CPU, torch.float32),
    }
    latents = {n: draw_latents(p, [request], settings, nullcontext()) for n, p in pipes.items()}
    assert relative(latents["merged"], latents["beside"]) < 1e-4
    assert relative(latents["base"], latents["beside"]) > 1e-3
    for part in ("vae", "scheduler", "tokenizer"):
        for file in (small_omnigen / part).iterdir():
            assert (tmp_path / "out" / part / file.name).read_bytes() == file.read_bytes()
    for name in ("model_index.json", "generation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_authors_layout_computes_what_the_adapted_model_does(
    small_omnigen: Path, adapter: Path, tmp_path: Path, strength: float
) -> None:
    """Read without our code: transformers' Phi-3 for the blocks, the rest written out."""
    _export(adapter, tmp_path / "out", small_omnigen, layout="omnigen", strength=strength)
    model = AuthorsModel(tmp_path / "out")
    x_t, t, prompts = inputs()
    with torch.no_grad():
        rows = [model.velocity(x_t[i : i + 1], t[i : i + 1], prompts[i]) for i in range(len(t))]
    expected = velocity(adapted(small_omnigen, adapter, strength))
    assert relative(torch.cat(rows), expected) < 1e-5
    # Only what takes in pictures was not needed for a picture from words.
    rest = {"input_x_embedder.proj.weight", "input_x_embedder.proj.bias"}
    assert model.state.keys() - model.used == rest
    base = load_file(small_omnigen / WEIGHTS)
    for name in rest:
        ours = name.replace("input_x_embedder.proj", "patch_embedding.input_image_proj")
        assert torch.equal(model.state[name], base[ours])


def test_the_authors_layout_comes_back_without_a_key_left_over(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """Undone by hand, every tensor is the one of the diffusers folder, to the last bit."""
    _export(adapter, tmp_path / "theirs", small_omnigen, layout="omnigen")
    _export(adapter, tmp_path / "ours", small_omnigen)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    renamed = [
        ("llm.", ""),
        ("o_proj", "to_out.0"),
        ("mlp.0.", "linear_1."),
        ("mlp.2.", "linear_2."),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("input_x_embedder.proj", "patch_embedding.input_image_proj"),
        ("x_embedder.proj", "patch_embedding.output_image_proj"),
        ("pos_embed", "patch_embedding.pos_embed"),
    ]
    back: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.items():
        if "qkv_proj" in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                back[name[4:].replace("qkv_proj", f"to_{letter}")] = rows
            continue
        for old, new in renamed:
            if old in name:
                name = name.replace(old, new)
                if old != "llm.":
                    break
        back[name] = tensor
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_the_authors_folder_is_whole(small_omnigen: Path, adapter: Path, tmp_path: Path) -> None:
    summary = _export(adapter, tmp_path / "out", small_omnigen, layout="omnigen", dtype="bf16")
    vae = {f"vae/{path.name}" for path in (small_omnigen / "vae").iterdir()}
    tokenizer = {path.name for path in (small_omnigen / "tokenizer").iterdir()}
    assert _files(tmp_path / "out") == vae | tokenizer | {
        "model.safetensors",
        "config.json",
        "export.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    # The small model's time embedding is narrower than what the authors' code takes as given.
    assert any("time_step_dim = 256" in note for note in summary.notes)


@pytest.mark.parametrize("layout", ["diffusers", "omnigen"])
def test_strength_0_is_the_base_to_the_last_bit(
    stored_as_bf16: Path, adapter: Path, tmp_path: Path, layout: str
) -> None:
    summary = _export(adapter, tmp_path / "out", stored_as_bf16, layout=layout, strength=0.0)
    base = load_file(stored_as_bf16 / WEIGHTS)
    name = WEIGHTS if layout == "diffusers" else "model.safetensors"
    found = load_file(tmp_path / "out" / name)
    if layout == "omnigen":
        fused = "llm.layers.1.self_attn.qkv_proj.weight"
        parts = [base[f"layers.1.self_attn.to_{letter}.weight"] for letter in "qkv"]
        assert torch.equal(found[fused].view(torch.int16), torch.cat(parts).view(torch.int16))
    else:
        assert found.keys() == base.keys()
        assert all(torch.equal(found[n].view(torch.int16), base[n].view(torch.int16)) for n in base)
    assert summary.details["survival"] is None
    assert any("changes nothing" in note for note in summary.notes)
    assert summary.counts["modules merged"] == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_the_dtype_is_the_one_asked_for_or_the_base_s(
    stored_as_bf16: Path, adapter: Path, tmp_path: Path, dtype: str | None
) -> None:
    summary = _export(adapter, tmp_path / "out", stored_as_bf16, dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in found.values()} == {wanted[dtype or "bf16"]}
    assert summary.details["dtype"] == (dtype or "bf16")
    assert summary.details["survival"] == pytest.approx(1.0, abs=0.01)


def test_a_small_change_that_rounding_takes_is_said(stored_as_bf16: Path, tmp_path: Path) -> None:
    """The figures are those of the weights on the disk, by numpy."""
    adapter = write_adapter(stored_as_bf16, tmp_path / "small.safetensors", size=0.005)
    summary = _export(adapter, tmp_path / "out", stored_as_bf16)
    base = load_file(stored_as_bf16 / WEIGHTS)
    found = load_file(tmp_path / "out" / WEIGHTS)
    exact = adapted(stored_as_bf16, adapter)
    dot = squares = error = 0.0
    shares = {}
    for name, module in exact.named_modules():
        if not isinstance(module, torch.nn.Linear) or not name.startswith("layers."):
            continue
        # A layer is linear: what it makes of the unit vectors is its matrix.
        with torch.no_grad():
            matrix = module(torch.eye(module.in_features)).T.double().numpy()
        weight = base[f"{name}.weight"].double().numpy()
        change, written = matrix - weight, found[f"{name}.weight"].double().numpy() - weight
        shares[f"{name}.weight"] = (written * change).sum() / (change**2).sum()
        dot += (written * change).sum()
        squares += (change**2).sum()
        error += ((written - change) ** 2).sum()
    assert len(shares) == summary.details["modules"] == 12
    assert summary.details["survival"] == pytest.approx(dot / squares, rel=1e-3)
    assert summary.details["relative_error"] == pytest.approx((error / squares) ** 0.5, rel=1e-3)
    worst = min(shares, key=lambda name: shares[name])
    assert summary.details["worst"]["weight"] == worst
    assert summary.details["worst"]["survival"] == pytest.approx(shares[worst], rel=1e-3)
    assert summary.details["survival"] < 0.95
    both = ("survival", "relative_error")
    figures = {key: summary.details[key] for key in both}
    assert summary.details["loaded_in_bf16"] == figures
    assert any("Much of it is lost" in note for note in summary.notes)
    assert any("only where it is also loaded in float32" in note for note in summary.notes)
    assert not any("Loaded in bf16" in note for note in summary.notes)

    kept = _export(adapter, tmp_path / "kept", stored_as_bf16, dtype="fp32")
    assert kept.details["survival"] == pytest.approx(1.0, abs=1e-4)
    # Who loads that in bfloat16 has what the export in bfloat16 holds.
    loaded = load_file(tmp_path / "kept" / WEIGHTS)
    assert all(torch.equal(loaded[name].to(torch.bfloat16), found[name]) for name in found)
    assert kept.details["loaded_in_bf16"] == pytest.approx(figures, rel=1e-6)
    assert any("Loaded in bf16" in note and "survives" in note for note in kept.notes)
    assert any("Much of it is lost there: load this export" in note for note in kept.notes)


def test_noise_beside_the_change_is_said(small_omnigen: Path, tmp_path: Path) -> None:
    """A base in float32 lies between the numbers of bfloat16: what rounding takes of some weights
    it gives to others."""
    adapter = write_adapter(small_omnigen, tmp_path / "small.safetensors", size=0.03)
    summary = _export(adapter, tmp_path / "out", small_omnigen, dtype="bf16")
    assert summary.details["survival"] > 0.95
    assert summary.details["relative_error"] > 0.5
    assert any("The noise of rounding is large beside it" in note for note in summary.notes)


def test_the_marker_says_what_was_merged_and_names_no_place(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    summary = _export(adapter, tmp_path / "out", small_omnigen, strength=0.5, dtype="bf16")
    text = (tmp_path / "out" / "export.json").read_text()
    marker = json.loads(text)
    assert marker["adapter"] == adapter.name
    assert marker["base"] == small_omnigen.name
    assert (marker["strength"], marker["dtype"]) == (0.5, "bf16")
    assert marker["layout"] == "diffusers"
    assert marker["survival"] == summary.details["survival"]
    assert marker["worst"]["weight"].startswith("layers.")
    assert set(marker["files"]) == _files(tmp_path / "out") - {"export.json"}
    assert str(tmp_path) not in text
    assert str(small_omnigen.parent) not in text


def test_the_multiplier_of_training_counts(small_omnigen: Path, tmp_path: Path) -> None:
    config = LokrConfig.model_validate({**CONFIG.model_dump(exclude_unset=True), "multiplier": 1.5})
    adapter = write_adapter(small_omnigen, tmp_path / "a.safetensors", config)
    _export(adapter, tmp_path / "out", small_omnigen, strength=2.0)
    merged = load_transformer(tmp_path / "out" / "transformer", torch.float32, CPU)
    assert relative(velocity(merged), velocity(adapted(small_omnigen, adapter, 2.0))) < 1e-5


def test_an_adapter_of_lycoris_own_file_is_merged_at_strength_1(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(lokr.read_adapter(adapter)[0], bare)
    for name, file in (("one", adapter), ("other", bare)):
        _export(file, tmp_path / name, small_omnigen)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_of_simpletuner_is_merged_at_the_strength_of_its_training(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """Its configuration is LyCORIS' own, with keys that ours has not."""
    theirs = {
        "algo": "lokr",
        "multiplier": 1.5,
        "linear_dim": 10000,
        "linear_alpha": 1,
        "factor": 4,
        "bypass_mode": True,
        "use_scalar": False,
        "dropout": 0.0,
        "apply_preset": {"target_module": ["Attention"], "name_algo_map": {}},
    }
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = lokr.read_adapter(adapter)[0]
    save_file(tensors, file, metadata={"lycoris_config": json.dumps(theirs)})
    _export(file, tmp_path / "theirs", small_omnigen)
    _export(adapter, tmp_path / "ours", small_omnigen, strength=1.5)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_base_than_the_adapter_s_own_is_refused_or_said(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """Any two models have the same shapes; which it was is told by its weights' key alone."""
    tensors, file = lokr.read_adapter(adapter)[0], tmp_path / "a.safetensors"
    other = {"step": "7", "base": "ann/omnigen", "transformer_key": "0" * 32}
    lokr.save_adapter(tensors, file, CONFIG, **other)
    said = (
        r"a\.safetensors \(step 7, BLAKE3 .{16}\) was trained on other weights than .*ann/omnigen"
    )
    with pytest.raises(UsageError, match=rf"{said}.* --any-base"):
        _export(file, tmp_path / "out", small_omnigen)
    assert not (tmp_path / "out").exists()
    summary = _export(file, tmp_path / "out", small_omnigen, any_base=True)
    assert any("was trained on other weights" in note for note in summary.notes)
    marker = json.loads((tmp_path / "out" / "export.json").read_text())
    own = key(blake3((small_omnigen / WEIGHTS).read_bytes()).hexdigest())
    assert marker["transformer_key"] == own
    assert (marker["adapter_step"], marker["trained_on"]) == ("7", "ann/omnigen")
    assert marker["adapter_blake3"] == blake3(file.read_bytes()).hexdigest()

    # The same weights under another name are the same base.
    lokr.save_adapter(tensors, file, CONFIG, base="ann/omnigen", transformer_key=own)
    summary = _export(file, tmp_path / "own", small_omnigen)
    assert not any("trained" in note for note in summary.notes)
    # Of earlier versions and other programs it is not known.
    summary = _export(adapter, tmp_path / "unknown", small_omnigen)
    assert any("does not say on which base it was trained" in note for note in summary.notes)


def test_a_base_that_is_not_whole_is_refused_and_what_it_has_too_much_is_said(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    whole = load_file(model / WEIGHTS)
    save_file({n: t for n, t in whole.items() if n != "norm.weight"}, model / WEIGHTS)
    with pytest.raises(UsageError, match=r"not whole: 1 tensors are missing, such as norm\.weight"):
        _export(adapter, tmp_path / "out", model)
    save_file(whole | {"norm.weight": torch.ones(3)}, model / WEIGHTS)
    with pytest.raises(UsageError, match=r"norm\.weight in .* is \[3\], and config\.json asks for"):
        _export(adapter, tmp_path / "out", model)
    save_file(whole | {"extra.weight": torch.ones(3)}, model / WEIGHTS)
    summary = _export(adapter, tmp_path / "out", model)
    assert any("1 tensors that its config.json does not know" in note for note in summary.notes)
    (model / "transformer" / "config.json").write_text('{"num_attention_heads": 0}')
    with pytest.raises(UsageError, match=r"config\.json is not that of an OmniGen"):
        _export(adapter, tmp_path / "none", model)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("diffusers", "tokenizer/tokenizer.json"),
        ("diffusers", "vae/config.json"),
        ("diffusers", "scheduler/scheduler_config.json"),
        ("omnigen", "tokenizer/tokenizer.json"),
        ("omnigen", "vae/config.json"),
    ],
)
def test_a_base_without_what_its_readers_start_from_is_refused(
    small_omnigen: Path, adapter: Path, tmp_path: Path, layout: Layout, file: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    for content in ("{", "[]", None):
        (model / file).unlink()
        if content is not None:
            (model / file).write_text(content)
        with pytest.raises(UsageError, match=rf"{file}.*[Ff]etch the base again"):
            _export(adapter, tmp_path / "out", model, layout=layout)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}, "nothing is written"


def test_a_base_copies_nothing_but_weights_of_its_own(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """A stranger's index may name any file, and any file may be called weights."""
    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    secret = tmp_path / "secret.safetensors"
    secret.write_text("secret")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    index = weights.with_name(f"{weights.name}.index.json")
    for name in ("../../secret.safetensors", str(secret), "config.json", "..\\secret.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": weights.name, "b": name}}))
        with pytest.raises(UsageError, match="no safetensors file beside it"):
            _export(adapter, tmp_path / "out", model)
    index.write_text(json.dumps({"weight_map": {"a": weights.name, "b": "gone.safetensors"}}))
    with pytest.raises(UsageError, match=r"gone\.safetensors is missing\. Fetch the model again"):
        _export(adapter, tmp_path / "out", model)
    index.unlink()
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(PipeError, match="not a whole safetensors file"):
        _export(adapter, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_number_that_float16_has_not_is_an_error(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    state = load_file(model / WEIGHTS)
    state["proj_out.bias"][0] = -1e5
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PipeError, match=r"proj_out.bias holds numbers .* fp16 is too narrow"):
        _export(adapter, tmp_path / "out", model, dtype="fp16")
    assert not (tmp_path / "out").exists()
    _export(adapter, tmp_path / "out", model, dtype="bf16")
    state["proj_out.bias"][0] = float("nan")
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PipeError, match="not finite"):
        _export(adapter, tmp_path / "nan", model, dtype="bf16")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_damage_and_mismatch_are_said_and_leave_nothing(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cut = tmp_path / "cut.safetensors"
    shutil.copy(adapter, cut)
    _cut(cut)
    with pytest.raises(PipeError, match="not a whole safetensors file"):
        _export(cut, out, small_omnigen)

    foreign = tmp_path / "foreign.safetensors"
    tensors = lokr.read_adapter(adapter)[0]
    for config in (
        "{]",
        "[]",
        '{"multiplier": "x"}',
        '{"multiplier": NaN}',
        '{"multiplier": true}',
    ):
        save_file(tensors, foreign, metadata={"lycoris_config": config})
        with pytest.raises(PipeError, match=r"metadata is damaged \(.+\)"):
            _export(foreign, out, small_omnigen)

    other = {name.replace("layers_1_", "layers_7_"): t for name, t in tensors.items()}
    save_file(other, foreign)
    with pytest.raises(UsageError, match=r"foreign.*layers_7_mlp_down_proj: it was trained on ano"):
        _export(foreign, out, small_omnigen)

    wide = {n: t.repeat(2, 1) if n.endswith("w1") else t for n, t in tensors.items()}
    save_file(wide, foreign)
    with pytest.raises(UsageError, match=r"foreign.*128 x 128, and this model's weight 64 x 128"):
        _export(foreign, out, small_omnigen)

    with pytest.raises(UsageError, match="no adapter"):
        _export(tmp_path / "none", out, small_omnigen)
    with pytest.raises(UsageError, match="one file"):
        _export(adapter, out, small_omnigen, layout="omnigen", limit=1000)
    with pytest.raises(UsageError, match="finite"):
        _export(adapter, out, small_omnigen, strength=float("nan"))

    model = tmp_path / "model"
    shutil.copytree(small_omnigen, model)
    _cut(model / WEIGHTS)
    with pytest.raises(PipeError, match="not a whole safetensors file"):
        _export(adapter, out, model)
    shutil.copy(small_omnigen / WEIGHTS, model / WEIGHTS)
    state = load_file(model / WEIGHTS)
    state["proj_out.bias"] = state["proj_out.bias"].to(torch.int8)
    save_file(state, model / WEIGHTS)
    with pytest.raises(UsageError, match="this base is quantised"):
        _export(adapter, out, model)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []


def test_the_command_takes_the_workspace_s_model_and_a_run_s_folder(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    here: Project = configured(tmp_path / "workspace", small_omnigen, tmp_path)
    checkpoint = here.root / "runs" / "default"
    checkpoint.mkdir(parents=True)
    shutil.copy(adapter, checkpoint / "adapter.safetensors")
    said = here.json("export", "runs/default", "-o", "merged", "--dtype", "bf16", "--quiet")
    assert said["folder"] == str(here.root / "merged")
    assert said["survival"] == pytest.approx(1.0, abs=0.01)
    with safe_open(here.root / "merged" / WEIGHTS, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}

    ended = here.run("export", "runs/default", "-o", "merged", status=2)
    assert "is not empty" in ended.stderr
    ended = here.run("export", "runs/default", "-o", "merged", "--overwrite", "--strength", "0.5")
    assert "12 modules merged" in ended.stdout
    assert "survives in fp32" in ended.stdout
    here.run(
        "export", "runs/default", "-o", "other", "--layout", "omnigen", "--model",
        str(small_omnigen),
    )  # fmt: skip
    assert (here.root / "other" / "model.safetensors").is_file()
    for options, said in (
        (("--max-shard-size", "5 potatoes"), "5GB or 500MB"),
        (("--model", str(small_omnigen), "-w", "."), "Give one of them"),
        (("--revision", "main"), "is of the model that --model names"),
        (("--model", str(small_omnigen), "--revision", "main"), "on this machine, not on the hub"),
        (("--ema",), "holds no ema.safetensors"),
    ):
        ended = here.run("export", "runs/default", "-o", "x", *options, status=2)
        assert said in ended.stderr
    ended = here.run("export", "runs/default/adapter.safetensors", "-o", "x", "--ema", status=2)
    assert "without --ema" in ended.stderr
    assert not (here.root / "x").exists()
    shutil.copy(adapter, checkpoint / "ema.safetensors")
    said = here.json("export", "runs/default", "-o", "average", "--ema", "--quiet")
    assert said["adapter"] == "ema.safetensors"


@pytest.mark.slow
def test_a_model_of_the_hub_is_merged_like_a_folder(
    small_omnigen: Path, adapter: Path, tmp_path: Path
) -> None:
    """The cache holds links; the export holds files, and names the repository."""
    with serve("ann/omnigen") as (endpoint, handler):
        handler.files = {
            name: (small_omnigen / name).read_bytes() for name in _files(small_omnigen)
        }
        named = ("--model", "ann/omnigen", "--revision", "main")
        command = [*COMMAND, "export", str(adapter), "-o", "out", *named]
        env = environment(endpoint, tmp_path / "hub")
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    _export(adapter, tmp_path / "expected", small_omnigen)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    for name in _files(tmp_path / "expected") - {"export.json"}:
        found = (tmp_path / "out" / name).read_bytes()
        assert found == (tmp_path / "expected" / name).read_bytes()
    marker = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (marker["base"], marker["revision"]) == ("ann/omnigen", COMMIT)
