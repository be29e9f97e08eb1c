"""Shards: what is written is read by stock webdataset, by offset, and is the same every time."""

from __future__ import annotations

import errno
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import WriteError
from manifests.views import current_latents
from omnigen_pipe.config import parse
from omnigen_pipe.latents.shards import (
    DamagedLatentError,
    MissingShardError,
    OpenShards,
    ShardError,
    ShardWriter,
    read_latent,
    shard_path,
)
from omnigen_pipe.workspace import Workspace

VAE_KEY = "a" * 32


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def workspace(root: Path, **vae: Any) -> Workspace:
    return Workspace(root, parse({"vae": vae}, "test"))


def latent(number: int, height: int = 4, width: int = 6, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(number).normal(size=(8, height, width)).astype(dtype)


def key(number: int) -> str:
    return f"{number:032x}"


def write(place: Workspace, numbers: range, bucket: str = "48x32", **options: Any) -> None:
    with ShardWriter(place, VAE_KEY, {}, **options) as writer:
        for number in numbers:
            writer.add(key(number), bucket, latent(number), {"pixels_key": key(number)})


def rows(place: Workspace) -> list[dict[str, Any]]:
    found = place.latents.read().sort_by([("shard", "ascending"), ("offset", "ascending")])
    result: list[dict[str, Any]] = found.to_pylist()
    return result


def read(place: Workspace, row: dict[str, Any]) -> np.ndarray:
    return read_latent(
        shard_path(place.root, row["shard"]),
        row["offset"],
        row["nbytes"],
        row["checksum"],
        tuple(row["shape"]),
        row["dtype"],
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_point_exactly_at_the_bytes(tmp_path: Path, dtype: str) -> None:
    place = workspace(tmp_path)
    with ShardWriter(place, VAE_KEY, {}) as writer:
        for number in range(5):
            writer.add(key(number), "48x32", latent(number, dtype=dtype), {"n": number})
    found = rows(place)
    assert [row["pixels_key"] for row in found] == [key(number) for number in range(5)]
    data = (tmp_path / found[0]["shard"]).read_bytes()
    for number, row in enumerate(found):
        raw = data[row["offset"] : row["offset"] + row["nbytes"]]
        assert np.array_equal(
            np.frombuffer(raw, dtype).reshape(row["shape"]), latent(number, dtype=dtype)
        )
        assert row["checksum"] == xxhash.xxh3_64_intdigest(raw)
        assert row["dtype"] == dtype
        assert row["vae_key"] == VAE_KEY
        assert (row["shard_nbytes"], row["shard_checksum"]) == (
            len(data),
            xxhash.xxh3_64_intdigest(data),
        )
        assert np.array_equal(read(place, row), latent(number, dtype=dtype))


def test_stock_webdataset_reads_it(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(3))
    url = str(tmp_path / rows(place)[0]["shard"])
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [key(n) for n in range(3)]
    for number, sample in enumerate(samples):
        assert np.array_equal(sample["moments.npy"], latent(number))
        assert sample["json"] == {"pixels_key": key(number)}


def test_tar_is_plain_and_names_nobody(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(2))
    path = tmp_path / rows(place)[0]["shard"]
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        for member in members:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
        loaded = tar.extractfile(members[0])
        assert loaded is not None
        assert np.array_equal(np.load(io.BytesIO(loaded.read())), latent(0))
    suffixes = [member.name.split(".", 1)[1] for member in members]
    assert suffixes == ["moments.npy", "json"] * 2
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tars = []
    for name, seconds in (("one", 10.0), ("two", 99.0)):
        clock = Clock()
        clock.now = seconds
        place = workspace(tmp_path / name)
        write(place, range(4), clock=clock)
        (row, *_) = rows(place)
        tars.append((place.root / row["shard"]).read_bytes())
    assert tars[0] == tars[1]


def test_fragment_has_the_name_of_its_shard(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    with ShardWriter(place, VAE_KEY, {"fingerprint": "f"}) as writer:
        writer.add(key(1), "48x32", latent(1), {})
    (fragment,) = place.latents.fragments()
    (shard,) = (tmp_path / "latents" / "48x32").glob("*.tar")
    assert fragment.stem == shard.stem
    assert pa.parquet.read_schema(fragment).metadata[b"omnigen_pipe.fingerprint"] == b"f"
    assert list(place.staging.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["48x32", "32x48"]), st.floats(0, 40)), max_size=12),
    st.sets(st.integers(0, 11)),
)
def test_every_sample_is_published_once_whatever_closes_shards(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, float]],
    failing: set[int],
) -> None:
    place = workspace(tmp_path_factory.mktemp("w"), shard_seconds=60)
    clock = Clock()
    with ShardWriter(place, VAE_KEY, {}, clock) as writer:
        for number, (bucket, seconds) in enumerate(steps):
            clock.now += seconds
            if number in failing:
                writer.add_failure(key(number), bucket, "broken")
            else:
                height, width = (4, 6) if bucket == "48x32" else (6, 4)
                writer.add(key(number), bucket, latent(number, height, width), {})
    found = {row["pixels_key"]: row for row in rows(place)}
    assert len(rows(place)) == len(found) == len(steps)
    for number, (bucket, _) in enumerate(steps):
        row = found[key(number)]
        assert row["bucket"] == bucket
        if number in failing:
            assert (row["status"], row["reason"], row["shard"]) == ("failed", "broken", None)
        else:
            assert row["shard"].startswith(f"latents/{bucket}/")
            height, width = row["shape"][1:]
            assert np.array_equal(read(place, row), latent(number, height, width))
    for row in rows(place):
        assert row["status"] == "failed" or (place.root / row["shard"]).is_file()


def test_a_shard_closes_by_size(tmp_path: Path) -> None:
    place = workspace(tmp_path, shard_size_mb=1)
    with ShardWriter(place, VAE_KEY, {}) as writer:
        for number in range(5):
            writer.add(key(number), "1024x1024", latent(number, 128, 128), {})
            written = writer.bytes_written
            assert (written > 0) == (number >= 3)  # 256 KiB each, and headers
    assert sorted(p.stat().st_size for p in tmp_path.glob("latents/*/*.tar"))[0] < 2**19
    assert sum(p.stat().st_size for p in tmp_path.glob("latents/*/*.tar")) == writer.bytes_written


def test_a_shard_closes_by_age_and_failures_do_too(tmp_path: Path) -> None:
    place, clock = workspace(tmp_path, shard_seconds=60), Clock()
    with ShardWriter(place, VAE_KEY, {}, clock) as writer:
        writer.add(key(1), "48x32", latent(1), {})
        clock.now = 59.9
        writer.close_if_old()
        assert rows(place) == []
        clock.now = 60.0
        writer.close_if_old()
        assert len(rows(place)) == 1
        writer.add_failure(key(2), "48x32", "broken")
        clock.now = 119.9
        writer.close_if_old()
        assert len(rows(place)) == 1
        clock.now = 120.0
        writer.close_if_old()
        assert len(rows(place)) == 2


def test_buckets_taken_in_turn_share_no_shard_and_need_one_each(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    with ShardWriter(place, VAE_KEY, {}) as writer:
        for number in range(6):
            bucket, height = (("48x32", 4), ("48x16", 2), ("48x8", 1))[number % 3]
            writer.add(key(number), bucket, latent(number, height), {})
        writer.close_all_but({"48x16", "16x16"})
        assert {row["bucket"] for row in rows(place)} == {"48x32", "48x8"}
        writer.add(key(6), "48x16", latent(6, 2), {})
    shards: dict[str, list[str]] = {}
    for row in rows(place):
        shards.setdefault(row["shard"], []).append(row["pixels_key"])
    assert sorted(shards.values()) == [
        [key(n) for n in numbers] for numbers in ((0, 3), (1, 4, 6), (2, 5))
    ]


def test_each_open_shard_has_an_age_and_a_size_of_its_own(tmp_path: Path) -> None:
    place, clock = workspace(tmp_path, shard_seconds=60, shard_size_mb=1), Clock()
    with ShardWriter(place, VAE_KEY, {}, clock) as writer:
        writer.add(key(1), "48x32", latent(1), {})
        clock.now = 50.0
        for number in range(2, 6):
            assert rows(place) == []
            writer.add(key(number), "1024x1024", latent(number, 128, 128), {})
        assert {row["bucket"] for row in rows(place)} == {"1024x1024"}
        writer.add(key(6), "1024x1024", latent(6, 128, 128), {})
        clock.now = 60.0
        writer.close_if_old()
        assert [row["pixels_key"] for row in rows(place) if row["bucket"] == "48x32"] == [key(1)]
        assert len(rows(place)) == 5
    assert len(rows(place)) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_by_an_exception_publishes_what_is_whole(
    tmp_path: Path, error: type[BaseException]
) -> None:
    place = workspace(tmp_path)

    def leave() -> None:
        with ShardWriter(place, VAE_KEY, {}) as writer:
            writer.add(key(1), "48x32", latent(1), {})
            raise error

    with pytest.raises(error):
        leave()
    (row,) = rows(place)
    assert np.array_equal(read(place, row), latent(1))


class FullDisk(io.BytesIO):
    """A file that takes one sample and then has no room."""

    def write(self, data: Any) -> int:
        if self.tell() > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_discards_the_open_shard_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = workspace(tmp_path)
    write(place, range(2))
    before = rows(place)
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", **o: FullDisk() if mode == "xb" else opened(p, mode, **o)
    )
    with pytest.raises(WriteError, match=r"No space left.*What was published before is valid"):
        write(place, range(2, 9))
    monkeypatch.undo()
    assert rows(place) == before
    assert len(list(tmp_path.glob("latents/*/*.tar"))) == 1
    assert list(place.staging.iterdir()) == []


def test_no_permission_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = workspace(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "latents")

    monkeypatch.setattr("omnigen_pipe.latents.shards.publish", refuse)

    def write_two() -> None:
        with ShardWriter(place, VAE_KEY, {}) as writer:
            writer.add(key(0), "48x32", latent(0), {})
            writer.add(key(1), "48x16", latent(1, 2), {})
            assert len(list(place.staging.iterdir())) == 2

    with pytest.raises(WriteError, match=r"Permission denied.*Give access"):
        write_two()
    assert rows(place) == []
    assert list(place.staging.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(3))
    row = rows(place)[1]
    path = tmp_path / row["shard"]
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[row["offset"] + 7] ^= 1
    for bad in (bytes(flipped), good[: row["offset"] + 10], good[:100], b""):
        path.write_bytes(bad)
        with pytest.raises(
            DamagedLatentError, match=r"verify --repair`.*encode-vae`.*check the disk"
        ):
            read(place, row)
    path.write_bytes(good)
    for wrong in ({"shape": [8, 5, 6]}, {"dtype": "float32"}, {"dtype": "object"}):
        with pytest.raises(DamagedLatentError):
            read(place, row | wrong)
    assert np.array_equal(read(place, row), latent(1))
    path.unlink()
    with pytest.raises(MissingShardError, match="is gone"):
        read(place, row)


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(1))
    moments = read(place, rows(place)[0])
    moments += 1  # torch.from_numpy warns about read-only arrays
    assert np.array_equal(read(place, rows(place)[0]), latent(0))


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "../outside.tar",
        "latents/../../outside.tar",
        "latents/../manifests/x.tar",
        "manifests/x.tar",
        "",
        "latents/out/x.tar",
    ],
)
def test_shards_outside_the_workspace_are_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "w" / "latents").mkdir(parents=True)
    (tmp_path / "w" / "latents" / "out").symlink_to(tmp_path)
    with pytest.raises(ShardError, match="does not lie in"):
        shard_path(tmp_path / "w", shard)


def test_a_symlinked_latents_folder_is_the_workspaces(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "latents").symlink_to(tmp_path / "elsewhere")
    expected = tmp_path / "w" / "latents" / "64x64" / "x.tar"
    assert shard_path(tmp_path / "w", "latents/64x64/x.tar") == expected


def test_a_tar_without_its_fragment_does_not_count(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(2))
    (fragment,) = place.latents.fragments()
    fragment.unlink()
    assert current_latents(place.latents.read(), place.root).num_rows == 0


def _read(shards: OpenShards, row: dict[str, Any]) -> np.ndarray:
    raw = bytearray(row["nbytes"])
    shards.read(row["shard"], row["offset"], row["checksum"], memoryview(raw))
    return np.frombuffer(raw, row["dtype"]).reshape(row["shape"])


def test_an_open_shard_gives_what_reading_it_alone_gives(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    write(place, range(4))
    write(place, range(4, 6), bucket="32x48")
    shards = OpenShards(place.root)
    for _ in range(2):
        for row in rows(place):
            assert np.array_equal(_read(shards, row), read(place, row))
    assert len(shards) == 2


def test_at_most_so_many_shards_are_open_and_the_least_used_goes_first(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    for number in range(5):
        write(place, range(number, number + 1))
    found = rows(place)
    shards = OpenShards(place.root, limit=2)
    for index in (0, 1, 0, 2, 3, 0, 4):
        assert np.array_equal(_read(shards, found[index]), read(place, found[index]))
        assert len(shards) <= 2
    shards.forget()
    assert len(shards) == 0


def test_a_shard_removed_while_it_is_open_is_missing(tmp_path: Path) -> None:
    """And what was read before is a copy."""
    place = workspace(tmp_path)
    write(place, range(2))
    first, second = rows(place)
    shards = OpenShards(place.root)
    before = _read(shards, first)
    (tmp_path / first["shard"]).unlink()
    with pytest.raises(MissingShardError, match="encode-vae"):
        _read(shards, second)
    assert np.array_equal(before, latent(0))
    assert len(shards) == 0


def test_a_shard_replaced_or_cut_while_it_is_open_is_never_read_wrong(tmp_path: Path) -> None:
    """Nor does it end the process, as a mapped page behind the end of a file would."""
    place = workspace(tmp_path)
    write(place, range(2))
    first, second = rows(place)
    path = tmp_path / first["shard"]
    data = path.read_bytes()
    shards = OpenShards(place.root)
    _read(shards, first)

    other = tmp_path / "other"
    other.write_bytes(bytes(len(data)))
    other.replace(path)
    with pytest.raises(DamagedLatentError, match=path.name):
        _read(shards, first)
    other.write_bytes(data)
    other.replace(path)
    assert np.array_equal(_read(shards, second), latent(1))

    with path.open("r+b") as handle:
        handle.truncate(second["offset"] + 1)
    assert np.array_equal(_read(shards, first), latent(0))
    with pytest.raises(DamagedLatentError, match=path.name):
        _read(shards, second)
    with path.open("r+b") as handle:
        handle.truncate(0)
    with pytest.raises(DamagedLatentError, match=path.name):
        _read(shards, first)


def test_an_open_shard_lies_inside_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="does not lie in"):
        OpenShards(tmp_path).read("../other.tar", 0, 0, memoryview(bytearray(2)))
