"""The benchmark of LoKr's modes still measures what it says, at toy widths."""

from __future__ import annotations

import json

import lokr_modes
import pytest
import torch

WIDTHS = (64, 128, 4)


def test_both_modes_compute_the_same_and_differ_from_no_adapter() -> None:
    model, network = lokr_modes.build(torch.float32, 1, WIDTHS)
    outputs = {}
    for mode in lokr_modes.MODES:
        lokr_modes.set_mode(network, mode)
        outputs[mode] = model[0].self_attn.to_q(torch.ones(1, 64))
    torch.testing.assert_close(outputs["bypass"], outputs["rebuild"], rtol=1e-4, atol=1e-5)
    assert (outputs["bypass"] - outputs["no adapter"]).abs().max() > 1e-3


def test_rebuilding_loses_small_deltas_in_bfloat16() -> None:
    errors = lokr_modes.accuracy(torch.bfloat16, WIDTHS)
    assert list(errors) == ["6e-05", "0.0006", "0.006"]
    assert all(error["bypass"] < 0.01 for error in errors.values())
    assert errors["6e-05"]["rebuild"] > 0.3 > errors["0.006"]["rebuild"]


@pytest.mark.slow
def test_every_case_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--widths", "64", "128", "4", "--tokens", "32", "--repeats", "1"]
    lokr_modes.main([*small, "--dtypes", "bfloat16", "--json"])
    found = json.loads(capsys.readouterr().out)
    (row,) = found["passes"]
    assert (row["dtype"], row["tokens"]) == ("bfloat16", 32)
    assert row["time"]["seconds"] > 0
    assert row["time"]["bypass"] == 1
    lokr_modes.show(found["passes"], found["bfloat16_errors"])
    assert capsys.readouterr().out.count("\n") == 9
