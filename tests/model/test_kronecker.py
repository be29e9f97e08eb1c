"""A Kronecker product applied to activations, against torch.kron written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_pipe.model.kronecker import kronecker_linear

SIDES = st.integers(1, 5)
RANKS = st.none() | st.integers(1, 4)


def factors(
    b: int, a: int, d: int, c: int, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(b + 10 * a + 100 * d + 1000 * c)

    def drawn(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    w2 = drawn(d, c) if rank is None else (drawn(d, rank), drawn(rank, c))
    return drawn(b, a), w2


def written_out(
    w1: torch.Tensor, w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    return torch.kron(w1, w2[0] @ w2[1] if isinstance(w2, tuple) else w2)


@given(SIDES, SIDES, SIDES, SIDES, RANKS, st.lists(st.integers(1, 3), max_size=2))
@settings(deadline=None)
def test_it_is_the_product_with_the_matrix_written_out(
    b: int, a: int, d: int, c: int, rank: int | None, rows: list[int]
) -> None:
    """Output and every gradient, for any number of leading dimensions."""
    w1, w2 = factors(b, a, d, c, rank)
    leaves = [w1, *(w2 if isinstance(w2, tuple) else (w2,))]
    x = torch.randn(*rows, a * c, dtype=torch.float64, requires_grad=True)
    ours = kronecker_linear(x, w1, w2)
    theirs = x @ written_out(w1, w2).T
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    of_ours = torch.autograd.grad((ours * weight).sum(), [x, *leaves])
    of_theirs = torch.autograd.grad((theirs * weight).sum(), [x, *leaves])
    torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize(("out", "into"), [(6, 2), (2, 6)])
def test_what_is_mixed_is_the_narrower_side(out: int, into: int) -> None:
    seen = []
    original = torch.einsum

    def einsum(text: str, w1: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        seen.append(groups.shape[-1])
        return original(text, w1, groups)

    w1, w2 = torch.randn(3, 3), torch.randn(out, into)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "einsum", einsum)
        kronecker_linear(torch.randn(4, 3 * into), w1, w2)
    assert seen == [min(out, into)]
