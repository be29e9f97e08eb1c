"""Where the model's parts come from: folders, the hub, and clear words where neither has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hub_stub import environment, serve
from manifests.errors import UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.model_files import model_part
from omnigen_pipe.workspace import Workspace

SCRIPT = (
    "import sys; from omnigen_pipe.workspace import Workspace;"
    "from omnigen_pipe.model_files import model_part;"
    "from manifests.errors import UsageError\n"
    "try:\n    print(model_part(Workspace.open(sys.argv[1]), sys.argv[2]))\n"
    "except UsageError as error:\n    print(error, file=sys.stderr); sys.exit(2)"
)


def _workspace(root: Path, **model: str) -> Workspace:
    return Workspace(root, parse({"model": model}, "test"))


def test_parts_of_a_folder_in_the_workspace(tmp_path: Path) -> None:
    for part in ("vae", "tokenizer"):
        (tmp_path / "omnigen" / part).mkdir(parents=True)
    here = _workspace(tmp_path, pretrained_model_name_or_path="omnigen")
    assert model_part(here, "vae") == tmp_path / "omnigen" / "vae"
    with pytest.raises(UsageError, match="no folder `transformer/`"):
        model_part(here, "transformer")


@pytest.mark.parametrize("inner", ["", "vae"])
def test_another_vae_may_be_a_folder_of_its_own_or_of_a_model(tmp_path: Path, inner: str) -> None:
    (tmp_path / "mine" / inner).mkdir(parents=True)
    here = _workspace(tmp_path, pretrained_vae_model_name_or_path="mine")
    assert model_part(here, "vae") == tmp_path / "mine" / inner


@pytest.mark.parametrize("name", ["./gone", "/gone/away", "gone", "a/b/c", "../gone"])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"gone|c does not exist"):
        model_part(_workspace(tmp_path, pretrained_model_name_or_path=name), "vae")


def _ask(root: Path, endpoint: str, name: str, part: str) -> subprocess.CompletedProcess[str]:
    text = f'[model]\npretrained_model_name_or_path = "{name}"\n'
    (root / "omnigen-pipe.toml").write_text(text)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), part],
        env=environment(endpoint, root / "hub"),
        capture_output=True,
        text=True,
    )


def test_only_the_wanted_part_is_fetched_from_the_hub_and_kept(tmp_path: Path) -> None:
    with serve("ann/omnigen") as (endpoint, handler):
        handler.files = {
            "vae/config.json": b"{}",
            "vae/diffusion_pytorch_model.safetensors": b"weights",
            "vae/diffusion_pytorch_model.bin": b"a pickle",
            "transformer/config.json": b"{}",
        }
        done = _ask(tmp_path, endpoint, "ann/omnigen", "vae")
        assert done.returncode == 0, done.stderr
        names = sorted(p.name for p in Path(done.stdout.strip()).iterdir())
        assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert not any("transformer" in request for request in handler.requests)
        assert not any(".bin" in request for request in handler.requests)
    again = _ask(tmp_path, endpoint, "ann/omnigen", "vae")
    assert again.stdout == done.stdout, "without the hub, the cache serves"


def test_a_model_that_the_hub_does_not_have_is_wrong_usage(tmp_path: Path) -> None:
    with serve("ann/omnigen") as (endpoint, _):
        done = _ask(tmp_path, endpoint, "ann/other", "vae")
    assert done.returncode == 2, done.stderr
    assert "`ann/other`" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
