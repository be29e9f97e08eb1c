"""Compiled blocks give what eager ones give, and new lengths do not compile anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.compilation import compile_blocks
from omnigen_pipe.model.transformer import load_transformer, predict_velocity
from small_omnigen import build_small_omnigen

CPU = torch.device("cpu")
#: Height and width of the latents, and prompts: two buckets and the same area turned, two lengths.
STEPS = [
    ((8, 8), [[5, 6], [7]]),
    ((8, 8), [[5, 6, 8, 9, 10, 11], [7, 8, 9]]),
    ((8, 16), [[5, 6], [7]]),
    ((16, 8), [[5, 6, 8, 9, 10, 11], [7, 8, 9]]),
    ((12, 12), [[1, 2, 3], [4, 5, 6]]),
]


@pytest.fixture(scope="module")
def deep_omnigen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More blocks than torch.compile keeps versions of one function (8). Do not change it."""
    return build_small_omnigen(tmp_path_factory.mktemp("model") / "deep", num_layers=10)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was compiled is forgotten, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _adapted(folder: Path, precision: str = "no_change") -> tuple[Any, Any]:
    transformer = load_transformer(folder / "transformer", torch.float32, CPU, precision)
    network = lokr.attach(transformer, LokrConfig(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return transformer, network


def _step(
    transformer: Any, network: Any, size: tuple[int, int], prompts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The base's prediction, as for regularisation, then the adapter's loss and gradients."""
    x_t = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8])
    network.zero_grad()
    network.set_multiplier(0.0)
    with torch.no_grad():
        base = predict_velocity(transformer, x_t, t, prompts)
    network.set_multiplier(1.0)
    loss = (predict_velocity(transformer, x_t, t, prompts) - x_t).pow(2).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return base, loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_inductor_gives_eagers_losses_and_gradients_with_bounded_graphs(
    deep_omnigen: Path,
) -> None:
    eager, eager_network = _adapted(deep_omnigen)
    compiled, compiled_network = _adapted(deep_omnigen)
    compile_blocks(compiled, "inductor")
    torch._dynamo.utils.counters.clear()
    graphs = []
    for checkpointing in (False, True):
        if checkpointing:
            eager.enable_gradient_checkpointing()
            compiled.enable_gradient_checkpointing()
        for size, prompts in STEPS:
            expected = _step(eager, eager_network, size, prompts)
            found = _step(compiled, compiled_network, size, prompts)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
            graphs.append(_graphs())
    print("graphs after each step:", graphs)
    assert 0 < graphs[0] <= 20  # not one per block, of which there are ten
    assert set(graphs) == {graphs[0]}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao", "nf4-bnb"])
def test_a_quantised_base_compiles_too(small_omnigen: Path, precision: str) -> None:
    """What inductor gets to see; generating its code is left out, as it takes the most time."""
    eager, eager_network = _adapted(small_omnigen, precision)
    compiled, compiled_network = _adapted(small_omnigen, precision)
    compile_blocks(compiled, "aot_eager")
    for size, prompts in STEPS[1:4]:
        expected = _step(eager, eager_network, size, prompts)
        found = _step(compiled, compiled_network, size, prompts)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_no_backend_changes_nothing(small_omnigen: Path) -> None:
    transformer, network = _adapted(small_omnigen)
    torch._dynamo.utils.counters.clear()
    compile_blocks(transformer, "no")
    _step(transformer, network, (8, 8), [[5], [6]])
    assert _graphs() == 0
