"""Where the model's parts come from: folders, the hub, and clear words where neither has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hub_stub import COMMIT, environment, serve
from manifests.errors import UsageError
from omnigen_pipe import model_files
from omnigen_pipe.config import parse
from omnigen_pipe.model_files import Model, local_model_part, lone_model, model_part
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


def test_a_part_needs_no_workspace(small_omnigen: Path) -> None:
    for part in ("transformer", "vae", "tokenizer", "scheduler"):
        found = Model(small_omnigen.name, small_omnigen.parent).part(part)
        assert found == small_omnigen / part
    index = Model(small_omnigen.name, small_omnigen.parent).beside("model_index.json")
    assert index == small_omnigen / "model_index.json"
    assert Model(str(small_omnigen), Path("/")).beside("nothing.json") is None


def test_a_model_is_called_as_others_know_it(tmp_path: Path, small_omnigen: Path) -> None:
    """The hub id, or the folder's own name, which may be a link's; never where it lies."""
    (tmp_path / "mine").symlink_to(small_omnigen)
    names = {
        "ann/omnigen": "ann/omnigen",
        "embedded": "embedded",
        "mine": "mine",
        "../" + tmp_path.name + "/mine/": "mine",
        str(tmp_path / "mine" / "vae" / ".."): "mine",
    }
    for name, label in names.items():
        assert Model(name, tmp_path).label == label


def test_a_model_of_the_hub_is_pinned_to_the_commit_of_its_revision(tmp_path: Path) -> None:
    """What the branch stands for later does not matter: all parts are of one state."""
    code = (
        "import sys; from pathlib import Path; from omnigen_pipe.model_files import Model\n"
        "pinned = Model('ann/omnigen', Path(sys.argv[1]), 'main').pinned()\n"
        "print(pinned.revision, pinned.part('vae').parent.name, pinned.pinned() == pinned)"
    )
    with serve("ann/omnigen") as (endpoint, handler):
        handler.files = {"transformer/config.json": b"{}", "vae/config.json": b"{}"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment(endpoint, tmp_path / "hub"),
            capture_output=True,
            text=True,
            check=True,
        )
        branch = [request for request in handler.requests if "/main" in request]
        assert len(branch) == 1, "the branch is looked up once"
    assert done.stdout.split() == [COMMIT, COMMIT, "True"]


def test_a_folder_has_no_commit(small_omnigen: Path) -> None:
    model = Model(str(small_omnigen), Path("/"))
    assert model.pinned() == model


def test_the_embedded_model_is_the_packages_own(
    tmp_path: Path, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is taken: a folder called so beside the configuration is not meant."""
    package = Path(model_files.__file__).parent
    assert package / "embedded" / "model" == model_files.EMBEDDED_FOLDER
    monkeypatch.setattr(model_files, "EMBEDDED_FOLDER", small_omnigen)
    (tmp_path / "embedded" / "vae").mkdir(parents=True)
    for part in ("transformer", "vae", "tokenizer", "scheduler"):
        assert Model("embedded", tmp_path).part(part) == small_omnigen / part
    here = _workspace(tmp_path, pretrained_model_name_or_path="embedded")
    assert local_model_part(here, "vae") == small_omnigen / "vae"
    index = Model("embedded", tmp_path).beside("model_index.json")
    assert index == small_omnigen / "model_index.json"
    own = _workspace(tmp_path, pretrained_model_name_or_path="./embedded")
    assert model_part(own, "vae") == tmp_path / "embedded" / "vae"


def test_an_installation_without_the_embedded_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "EMBEDDED_FOLDER", tmp_path / "gone")
    with pytest.raises(UsageError, match="embedded model is not in this installation"):
        Model("embedded", tmp_path).part("vae")


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


def test_a_file_beside_the_parts_is_fetched_alone_or_is_not_there(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from omnigen_pipe.model_files import Model\n"
        "print([Model('ann/omnigen', Path(sys.argv[1])).beside(name) for name in"
        " ('model_index.json', 'generation.json')])"
    )
    with serve("ann/omnigen") as (endpoint, handler):
        handler.files = {"model_index.json": b"{}", "vae/config.json": b"{}"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment(endpoint, tmp_path / "hub"),
            capture_output=True,
            text=True,
            check=True,
        )
        assert not any("vae" in request for request in handler.requests)
    assert "model_index.json'), None]" in done.stdout


def test_a_model_that_the_hub_does_not_have_is_wrong_usage(tmp_path: Path) -> None:
    with serve("ann/omnigen") as (endpoint, _):
        done = _ask(tmp_path, endpoint, "ann/other", "vae")
    assert done.returncode == 2, done.stderr
    assert "`ann/other`" in done.stderr
    assert "HF_ENDPOINT" in done.stderr


def test_a_model_that_stands_alone_is_a_folder_or_of_the_hub(tmp_path: Path) -> None:
    """At its revision, and never a pickle; without a download nothing is asked."""
    (tmp_path / "tiny").mkdir()
    here = _workspace(tmp_path)
    assert lone_model(here, "tiny", None) == tmp_path / "tiny"
    with pytest.raises(UsageError, match="gone does not exist"):
        lone_model(here, "gone", None, download=False)
    code = (
        "import sys; from omnigen_pipe.workspace import Workspace;"
        "from omnigen_pipe.model_files import lone_model\n"
        "here = Workspace.open(sys.argv[1])\n"
        f"print(lone_model(here, 'ann/tiny', '{COMMIT}', download=False),"
        f" lone_model(here, 'ann/tiny', '{COMMIT}'))"
    )
    (tmp_path / "omnigen-pipe.toml").write_text("")
    with serve("ann/tiny") as (endpoint, handler):
        weights = "diffusion_pytorch_model.safetensors"
        others = ("decoder.safetensors", "diffusion_pytorch_model.bin")
        handler.files = {name: b"{}" for name in ("config.json", weights, *others)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment(endpoint, tmp_path / "hub"),
            capture_output=True,
            text=True,
            check=True,
        )
        assert not any("/main" in request for request in handler.requests)
    before, folder = done.stdout.split()
    assert (before, Path(folder).name) == ("None", COMMIT)
    assert sorted(p.name for p in Path(folder).iterdir()) == ["config.json", weights]
