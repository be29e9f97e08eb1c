"""Weight files written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from manifests.errors import UsageError
from omnigen_pipe.export.weight_files import Entry, file_names, parse_size, split, write


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "empty": (0, 4), "c.d": (2, 3, 1, 1)}
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64]
    drawn = {
        name: torch.randn(shape, generator=generator).to(kind)
        for (name, shape), kind in zip(shapes.items(), kinds, strict=True)
    }
    return drawn | {"turned": torch.randn(4, 6, generator=generator).T}


def _entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = _tensors()

    def in_rows(entry: Entry) -> Iterator[torch.Tensor]:
        tensor = tensors[entry.name]
        yield from tensor.split(2) if tensor.ndim else [tensor]

    path = tmp_path / "x.safetensors"
    write(path, _entries(tensors), in_rows)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for name, place in header.items():
        assert place["data_offsets"][0] % tensors[name].element_size() == 0


def test_a_tensor_that_does_not_fill_its_place_is_a_mistake_of_ours(tmp_path: Path) -> None:
    entry = Entry("a", torch.float32, (4,))
    for part in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^a "):
            write(tmp_path / "x", [entry], lambda _, part=part: [part])


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_files_hold_everything_in_order_up_to_the_limit(sizes: list[int], limit: int) -> None:
    entries = [Entry(str(i), torch.float16, (n,)) for i, n in enumerate(sizes)]
    files = split(entries, limit)
    assert [entry for file in files for entry in file] == entries
    totals = [sum(entry.nbytes for entry in file) for file in files]
    assert all(n <= limit or len(f) == 1 for n, f in zip(totals, files, strict=True))
    for total, following in zip(totals, files[1:], strict=False):
        assert total + following[0].nbytes > limit, "a file is begun only where it must be"


def test_files_have_diffusers_names(tmp_path: Path) -> None:
    """Against what diffusers' own `save_pretrained` writes."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    for folder, size, count in (("one", "5GB", 1), ("more", "300KB", None)):
        vae.save_pretrained(tmp_path / folder, max_shard_size=size)
        theirs = sorted(path.name for path in (tmp_path / folder).glob("*.safetensors"))
        assert count in (None, len(theirs))
        assert file_names(len(theirs)) == theirs
    assert (tmp_path / "more" / "diffusion_pytorch_model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5 GiB", "5GB or so"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="5GB or 500MB"):
        parse_size(text)
