"""The benchmark of many images still builds what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scale


@pytest.mark.slow
def test_every_step_finds_what_it_was_built_to_find(
    tmp_path: Path, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "FRAGMENTS", 20)
    steps = scale.measure(tmp_path / "w", small_omnigen, 300)
    for step, took in steps.items():
        assert 0 < took["seconds"] < 600, step
        assert 20 < took["peak_mib"] < 1024, step
    assert steps["bucket, the first time"]["counts"]["samples"] == 300
    assert steps["encode-vae, all there"]["counts"]["already there"] == 300
    assert steps["latents, a tenth missing"]["counts"] == {"missing": 30}
    assert steps["tokenize, all there"]["counts"]["tokenised"] == 0
    assert (tmp_path / "w" / "manifests" / "samples.parquet").exists()


def test_growth_is_the_exponent_between_the_last_two_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    took = {10: 9.0, 100: 1.0, 1000: 100.0}
    results = {n: {"a": {"seconds": s, "peak_mib": 5}} for n, s in took.items()}
    assert scale.growth(results) == {"a": 2.0}
    assert scale.growth({10: results[10]}) == {}
    scale.show(results)
    assert capsys.readouterr().out.splitlines()[1].endswith("2.00")


def test_the_temporary_folder_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "build_small_omnigen", lambda folder: folder)
    monkeypatch.setattr(scale, "measure", lambda root, model, n: {"a": {"seconds": n, "n": n}})
    scale.main(["--images", "1000000", "--folder", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["growth"] == {"a": 1.0}
    assert list(tmp_path.iterdir()) == []
