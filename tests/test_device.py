"""Devices and precisions by name."""

from __future__ import annotations

import pytest
import torch

from manifests.errors import UsageError
from omnigen_pipe.device import pick_device, pick_precision


@pytest.mark.parametrize("name", ["abacus", "mps", "meta", "xpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_wrong_usage(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}"):
        pick_device(name)


def test_without_a_name_it_is_cuda_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == expected
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_is_float32_on_the_cpu_and_names_mean_what_they_say() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("no", cpu) == torch.float32
