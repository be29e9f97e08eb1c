"""The benchmark at true scale still does what it says, on a model of narrow blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import true_scale

from omnigen_pipe.memory.skeleton import OMNIGEN_V1
from omnigen_pipe.progress import Progress


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_is_taken_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {
        **OMNIGEN_V1,
        "hidden_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "num_layers": 2,
    }
    found = true_scale.measure(tmp_path, narrow, 64, Progress(quiet=True))
    assert found["weights_file_bytes"] > 2 * found["parameters"]
    assert found["adapter_file_bytes"] > 4 * found["adapter_parameters"] > 0
    assert found["loss"] > 0
    assert found["grad_norm"] > 0
    assert found["peak_with_checkpoint"] >= found["peak_of_step"] > 0
    true_scale.show(found)
    assert "peak of the step" in capsys.readouterr().out
