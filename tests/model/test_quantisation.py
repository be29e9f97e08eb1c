"""Quantised base models: what an adapter learns on them is what it would learn on the plain one.

Everything is compared with the unquantised float32 model. Run on the CPU; where bitsandbytes
computes differently on a GPU, `docs/precision.md` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.flow import interpolate, target
from omnigen_pipe.model.quantisation import check_available, quantise, stored_bytes
from omnigen_pipe.model.transformer import load_transformer, predict_velocity
from omnigen_pipe.precisions import BasePrecision
from small_omnigen import build_small_omnigen

CPU = torch.device("cpu")
QUANTISED = [name for name in get_args(BasePrecision) if name != "no_change"]

#: What is slow of each: quanto compiles C++ before it packs int4 on the CPU, once in a process.
_MARKS = {"int4-quanto": [pytest.mark.slow]}
COMPUTED = [pytest.param(name, marks=_MARKS.get(name, [])) for name in QUANTISED]
#: Each precision on each base dtype.
CASES = [
    pytest.param(name, dtype, marks=_MARKS.get(name, []), id=f"{name}-{dtype}")
    for name in QUANTISED
    for dtype in (torch.float32, torch.bfloat16)
]

#: Bounds on the output's relative error and on one minus the cosine of the adapter's gradients.
#: The step of the format, with room: bfloat16 bases add their own 0.7 %.
BOUNDS = {
    "int8-quanto": (0.01, 1e-4),
    "int8-torchao": (0.01, 1e-4),
    "int8-bnb": (0.01, 1e-4),
    "fp8-quanto": (0.03, 2e-3),
    "fp8-torchao": (0.03, 2e-3),
    "int4-quanto": (0.08, 0.01),
    "nf4-bnb": (0.12, 0.02),
}


@pytest.fixture(scope="module")
def wide_omnigen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OmniGen wide enough for every library's groups. Do not change it."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    return build_small_omnigen(folder, hidden_size=256, num_layers=2, num_heads=4)


class Outcome(NamedTuple):
    """A forward and backward pass: velocity, the adapter's gradients in one vector, loss."""

    velocity: torch.Tensor
    gradient: torch.Tensor
    loss: float


def _adapted(
    folder: Path, precision: str, dtype: torch.dtype = torch.float32, strength: float = 0.02
) -> tuple[Any, Any]:
    """The quantised transformer and its adapter, whose weights are drawn with `strength`."""
    transformer = load_transformer(folder / "transformer", dtype, CPU, precision, "cpu")
    network = lokr.attach(transformer, LokrConfig(), seed=0)
    if strength:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    return transformer, network


def _pass(transformer: Any, network: Any) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 2, 4, 8, 8, generator=generator)
    t = torch.tensor([0.3, 0.8])
    network.zero_grad()
    reduced = transformer.dtype != torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
        velocity = predict_velocity(transformer, interpolate(x1, x0, t), t, [[5, 6, 9], [7]])
    loss = (velocity.float() - target(x1, x0)).pow(2).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    return Outcome(velocity.detach().float(), gradient, loss.item())


@pytest.fixture(scope="module")
def plain(wide_omnigen: Path) -> Outcome:
    """The unquantised float32 model's pass."""
    return _pass(*_adapted(wide_omnigen, "no_change"))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight is made of, whichever library made it."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
        return
    yield value.data
    state = getattr(value, "quant_state", None)
    if state is not None:  # bitsandbytes, 4 bits
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    if getattr(value, "SCB", None) is not None:  # bitsandbytes, 8 bits
        yield value.SCB


@pytest.mark.parametrize(("precision", "dtype"), CASES)
def test_output_and_gradients_are_near_those_of_the_plain_model(
    wide_omnigen: Path, plain: Outcome, precision: str, dtype: torch.dtype
) -> None:
    outcome = _pass(*_adapted(wide_omnigen, precision, dtype))
    error = (outcome.velocity - plain.velocity).norm() / plain.velocity.norm()
    cosine = torch.cosine_similarity(outcome.gradient, plain.gradient, dim=0)
    print(f"{precision} {dtype}: error {error:.4f}, cosine {cosine:.5f}")
    largest, off = BOUNDS[precision]
    assert 0 < error < largest
    assert cosine > 1 - off


@pytest.mark.parametrize("precision", COMPUTED)
def test_checkpointing_and_a_pass_without_gradients_before_change_no_gradient(
    wide_omnigen: Path, precision: str
) -> None:
    """The pass is regularisation's: some libraries repack weights when they see one."""
    transformer, network = _adapted(wide_omnigen, precision, torch.bfloat16)
    expected = _pass(transformer, network)
    network.set_multiplier(0.0)
    with torch.no_grad():
        predict_velocity(transformer, torch.ones(1, 4, 8, 8), torch.tensor([0.5]), [[5]])
    network.set_multiplier(1.0)
    transformer.enable_gradient_checkpointing()
    outcome = _pass(transformer, network)
    torch.testing.assert_close(outcome.gradient, expected.gradient, rtol=1e-6, atol=1e-9)
    assert outcome.loss == expected.loss


@pytest.mark.parametrize("precision", COMPUTED)
def test_the_adapter_is_the_one_of_the_plain_model(wide_omnigen: Path, precision: str) -> None:
    transformer, network = _adapted(wide_omnigen, precision, torch.bfloat16, strength=0)
    plain, plain_network = _adapted(wide_omnigen, "no_change", torch.bfloat16, strength=0)
    config = LokrConfig()
    counts = lokr.count_targets(transformer, network, config)
    assert counts == lokr.count_targets(plain, plain_network, config)
    assert [count.modules for count in counts] == [2 * 4, 2 * 2]
    ours, theirs = lokr.weights(network), lokr.weights(plain_network)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    wrong = LokrConfig.model_validate({"apply_preset": {"target_module": ["Attn"]}})
    with pytest.raises(UsageError, match=r"`Attn` matches nothing.*Attention.*FeedForward"):
        lokr.check_targets(transformer, wrong)


@pytest.mark.parametrize("precision", COMPUTED)
def test_only_the_blocks_are_quantised(wide_omnigen: Path, precision: str) -> None:
    folder = wide_omnigen / "transformer"
    transformer = load_transformer(folder, torch.bfloat16, CPU, precision, "cpu")
    plain = load_transformer(folder, torch.bfloat16, CPU)
    assert transformer.dtype == torch.bfloat16
    after = transformer.state_dict()
    for name, tensor in plain.state_dict().items():
        if not (name.startswith("layers.") and tensor.ndim == 2):
            assert torch.equal(after[name], tensor), name
            assert after[name].dtype == tensor.dtype


@pytest.mark.parametrize(("precision", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(512, 256), (256, 352), (128, 128)], ids=str)
def test_the_stated_bytes_are_those_of_the_tensors(
    precision: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    block = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=dtype))
    transformer = torch.nn.Module()
    transformer.layers, transformer.dtype = torch.nn.ModuleList([block]), dtype  # type: ignore
    quantise(transformer, precision, CPU, "cpu")
    weight = transformer.layers[0][0].weight  # type: ignore[index]
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(weight)
    }
    assert sum(stored.values()) == stored_bytes(shape, precision, dtype)
    assert stored_bytes(shape, precision, dtype) < 0.55 * rows * columns * dtype.itemsize


def test_the_stated_bytes_of_a_plain_layer() -> None:
    assert stored_bytes((3072, 8192), "no_change", torch.bfloat16) == 3072 * 8192 * 2
    with pytest.raises(ValueError, match="int3"):
        stored_bytes((1, 1), "int3", torch.bfloat16)


@pytest.mark.parametrize("precision", COMPUTED)
@pytest.mark.parametrize("via", ["cpu", "accelerator"])
def test_every_tensor_is_moved(wide_omnigen: Path, precision: str, via: str) -> None:
    """On torch's device without memory, as no other is at hand: nothing may stay behind."""
    meta = torch.device("meta")
    folder = wide_omnigen / "transformer"
    transformer = load_transformer(folder, torch.bfloat16, meta, precision, via)
    for name, parameter in transformer.named_parameters():
        assert {tensor.device.type for tensor in _tensors(parameter)} == {"meta"}, name
    assert {buffer.device.type for buffer in transformer.buffers()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", COMPUTED)
def test_an_adapter_learns_as_much_as_on_the_plain_model(
    wide_omnigen: Path, precision: str
) -> None:
    def overfit(precision: str) -> tuple[float, float]:
        transformer, network = _adapted(wide_omnigen, precision, strength=0)
        x_t, t = torch.ones(1, 4, 8, 8), torch.tensor([0.5])
        network.set_multiplier(0.0)
        with torch.no_grad():
            before = predict_velocity(transformer, x_t, t, [[5]])
        network.set_multiplier(1.0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            losses.append(_pass(transformer, network).loss)
            optimizer.step()
        network.set_multiplier(0.0)
        with torch.no_grad():
            after = predict_velocity(transformer, x_t, t, [[5]])
        assert torch.equal(before, after)  # the base is as it was
        return losses[0], losses[-1]

    first, last = overfit("no_change")
    quantised_first, quantised_last = overfit(precision)
    print(f"{precision}: {quantised_first:.4f} to {quantised_last:.4f}; {first:.4f} to {last:.4f}")
    assert last < 0.7 * first
    fallen = (quantised_first - quantised_last) / (first - last)
    assert 0.9 < fallen < 1.1


@pytest.mark.parametrize(
    ("precision", "package", "modules"),
    [
        ("int8-quanto", "optimum-quanto", ["optimum"]),
        ("fp8-torchao", "torchao", ["torchao"]),
        ("nf4-bnb", "bitsandbytes", ["bitsandbytes", "bitsandbytes.nn"]),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, precision: str, package: str, modules: list[str]
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'omnigen-pipe\[quantised\]'"):
        check_available(precision, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
@pytest.mark.parametrize("precision", COMPUTED)
def test_a_device_that_cannot_is_named(precision: str) -> None:
    with pytest.raises(UsageError, match=f"{precision}.* does not run on cuda"):
        check_available(precision, torch.device("cuda"))


def test_what_is_there_is_available() -> None:
    for precision in get_args(BasePrecision):
        check_available(precision, CPU, torch.bfloat16)
