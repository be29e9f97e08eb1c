"""Checking a shard: whatever changes is found, and the blame falls on as few latents as it may."""

from __future__ import annotations

import errno
import os
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_pipe.config import parse
from omnigen_pipe.latents import checking
from omnigen_pipe.latents.checking import Checked, check_shard
from omnigen_pipe.latents.shards import ShardWriter
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Shard:
    """A published shard: its file and the rows that the log holds of it."""

    path: Path
    rows: list[dict[str, Any]]

    def check(self, **options: Any) -> Checked:
        return check_shard(self.path, self.rows, **options)


def make(root: Path, sizes: list[tuple[int, int, str]], seed: int = 0) -> Shard:
    """A shard of one latent for each (height, width, dtype) in latent pixels."""
    place = Workspace(root, parse({}, "test"))
    draws = np.random.default_rng(seed)
    with ShardWriter(place, "v" * 32, {}) as writer:
        for number, (height, width, dtype) in enumerate(sizes):
            moments = draws.normal(size=(8, height, width)).astype(dtype)
            writer.add(f"{number:032x}", "64x64", moments, {"number": number})
    rows = place.latents.read().sort_by("offset").to_pylist()
    return Shard(root / rows[0]["shard"], rows)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Two latents in the smallest tar, 10 KiB."""
    return make(tmp_path, [(2, 3, "float16"), (3, 2, "float32")])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["float16", "float32"])),
        min_size=1,
        max_size=6,
    ),
    st.integers(50, 30_000),
    st.randoms(use_true_random=False),
)
def test_an_intact_shard_is_intact_and_one_bit_is_found_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int, str]],
    piece_nbytes: int,
    draws: random.Random,
) -> None:
    shard = make(tmp_path_factory.mktemp("w"), sizes, seed=draws.randrange(1000))
    none = [None] * len(sizes)
    size = shard.path.stat().st_size
    assert shard.check(piece_nbytes=piece_nbytes) == Checked(none, size)
    assert shard.check(quick=True) == Checked(none, 0)
    draws.shuffle(shard.rows)  # nor does their order matter
    assert shard.check(piece_nbytes=piece_nbytes) == Checked(none, size)
    for _ in range(10):
        _flip_and_check(shard, draws.randrange(size), draws.randrange(8), piece_nbytes)


def _flip_and_check(shard: Shard, byte: int, bit: int, piece_nbytes: int = 2**22) -> None:
    """Flip one bit: its own latent is blamed, or all where it lies in none."""
    with shard.path.open("r+b") as handle:
        handle.seek(byte)
        (value,) = handle.read(1)
        handle.seek(byte)
        handle.write(bytes([value ^ 1 << bit]))
        handle.flush()
        problems = shard.check(piece_nbytes=piece_nbytes).problems
        handle.seek(byte)
        handle.write(bytes([value]))
    hit = [row["offset"] <= byte < row["offset"] + row["nbytes"] for row in shard.rows]
    expected = [checking.CHANGED if mine else None for mine in hit]
    if not any(hit):
        expected = [checking.AROUND] * len(hit)
    assert problems == expected, (byte, bit)


def test_a_flipped_bit_in_any_byte_is_found(shard: Shard) -> None:
    draws = random.Random(7)
    for byte in range(shard.path.stat().st_size):
        _flip_and_check(shard, byte, draws.randrange(8))
    assert shard.check().problems == [None, None]


@pytest.mark.slow
def test_every_single_flipped_bit_is_found(shard: Shard) -> None:
    for byte in range(shard.path.stat().st_size):
        for bit in range(8):
            _flip_and_check(shard, byte, bit)
    assert shard.check().problems == [None, None]


@pytest.mark.parametrize("quick", [False, True])
def test_a_cut_at_any_boundary_and_an_added_byte_are_found(shard: Shard, quick: bool) -> None:
    good = shard.path.read_bytes()
    boundaries = set(range(0, len(good), tarfile.BLOCKSIZE)) | {len(good)}
    for row in shard.rows:
        boundaries |= {row["offset"], row["offset"] + row["nbytes"]}
    with tarfile.open(shard.path, "r:") as tar:
        for member in tar.getmembers():
            end = member.offset_data + member.size
            boundaries |= {member.offset, member.offset_data, end}
    lengths = {b + near for b in boundaries for near in (-1, 0, 1)} - {-1, len(good)}
    assert {0, 1, len(good) - 1, len(good) + 1} <= lengths
    for length in sorted(lengths):
        shard.path.write_bytes((good + b"\0")[:length])
        problem = f"the shard has {length} bytes and was published with {len(good)}"
        assert shard.check(quick=quick) == Checked([problem] * 2)


@pytest.mark.parametrize("quick", [False, True])
def test_a_missing_shard_is_found(shard: Shard, quick: bool) -> None:
    shard.path.unlink()
    missing = Checked([checking.MISSING] * 2)
    assert shard.check(quick=quick) == missing
    shard.path.mkdir()
    assert shard.check(quick=quick) == missing, "a folder is no shard"
    shard.path.rmdir()
    os.mkfifo(shard.path)
    assert shard.check(quick=quick) == missing, "nor is a pipe, which would be waited for"
    shard.path.unlink()
    shard.path.parent.rmdir()
    shard.path.parent.write_bytes(b"")
    assert shard.check(quick=quick) == missing


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    sizes = [(2, 3, "float16"), (2, 3, "float16")]
    one, other = make(tmp_path / "one", sizes, seed=1), make(tmp_path / "other", sizes, seed=2)
    aside = tmp_path / "aside"
    one.path.rename(aside)
    other.path.rename(one.path)
    aside.rename(other.path)
    for shard in (one, other):
        assert shard.check().problems == [checking.CHANGED] * 2


def test_zeroed_blocks_are_found(shard: Shard) -> None:
    """What a disk gives for a sector that it has lost, or a file system for one never written."""
    good = shard.path.read_bytes()
    for start in range(0, len(good), tarfile.BLOCKSIZE):
        block = good[start : start + tarfile.BLOCKSIZE]
        if any(block):
            zeros = bytes(len(block))
            shard.path.write_bytes(good[:start] + zeros + good[start + len(block) :])
            assert any(shard.check().problems), start


def test_a_shard_with_marked_rows_is_judged_by_its_other_arrays(shard: Shard) -> None:
    first, second = shard.rows
    data = bytearray(shard.path.read_bytes())
    data[first["offset"]] ^= 1
    shard.path.write_bytes(data)
    rest = Shard(shard.path, [second])
    assert rest.check(marked=True).problems == [None]
    assert rest.check().problems == [checking.AROUND], "the mark says why the whole differs"
    data[second["offset"]] ^= 1
    shard.path.write_bytes(data)
    assert rest.check(marked=True).problems == [checking.CHANGED]
    shard.path.write_bytes(data[:-1])
    assert rest.check(marked=True, quick=True).problems[0] is not None


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"dtype": "object"}, checking.MISFIT),
        ({"dtype": "float16"}, checking.MISFIT),
        ({"dtype": None}, checking.MISFIT),
        ({"shape": [8, 3, 3]}, checking.MISFIT),
        ({"shape": [-8, -3, 2]}, checking.MISFIT),
        ({"shape": []}, checking.MISFIT),
        ({"shape": None}, checking.MISFIT),
        ({"nbytes": None}, checking.MISFIT),
        ({"offset": -1}, checking.OUTSIDE),
        ({"offset": 2**40}, checking.OUTSIDE),
        ({"offset": None}, checking.OUTSIDE),
        ({"checksum": 1}, checking.CHANGED),
        ({"checksum": None}, checking.CHANGED),
    ],
)
def test_a_row_that_cannot_be_right_is_found(
    shard: Shard, wrong: dict[str, Any], problem: str
) -> None:
    first, second = shard.rows
    assert check_shard(shard.path, [first, second | wrong]).problems == [None, problem]


@pytest.mark.parametrize("wrong", [{"shard_nbytes": 1}, {"shard_checksum": 1}])
@pytest.mark.parametrize("quick", [False, True])
def test_rows_that_disagree_about_their_shard_are_found(
    shard: Shard, wrong: dict[str, Any], quick: bool
) -> None:
    first, second = shard.rows
    problems = check_shard(shard.path, [first, second | wrong], quick=quick).problems
    assert problems == [checking.DISAGREEING] * 2


def test_arrays_that_overlap_are_each_judged(shard: Shard) -> None:
    """Such rows come from nowhere but a faulty manifest; one right row must not hide them."""
    first, second = shard.rows
    inside = {**second, "offset": first["offset"] + 2}
    problems = check_shard(shard.path, [first, inside, second], piece_nbytes=100).problems
    assert problems == [None, checking.CHANGED, None]


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG])
def test_a_disk_that_cannot_read_is_damage(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checking, "_read", fail)
    assert shard.check().problems == [f"the shard cannot be read: {os.strerror(number)}"] * 2


def test_a_refused_permission_is_no_damage(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checking, "_read", refuse)
    with pytest.raises(PermissionError):
        shard.check()


def test_a_shard_that_shrinks_while_it_is_read_is_damage(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = shard.path.stat().st_size
    shard.path.write_bytes(shard.path.read_bytes()[: size // 2])
    monkeypatch.setattr(checking, "file_size", lambda path: size)
    problem = f"the shard has {size // 2} bytes and was published with {size}"
    assert shard.check() == Checked([problem] * 2, size // 2)
