"""Killed at any instant: nothing is lost, nothing is doubled, and no reader meets half of it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path

import forked
import pytest
from effect import (
    Effect,
    Reader,
    check_equal,
    check_growing,
    check_nothing_twice,
    check_whole,
    effect,
    leftovers,
)
from pipeline_project import Project
from writers import WRITERS, Writers, prepare

from omnigen_pipe.workspace import Workspace

#: Signal 9, as an exit status of multiprocessing.
KILLED = -9

#: After so many, a workspace's work is let come to its end.
_KILLS_PER_ROUND = 8


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Four pictures in two buckets."""
    return prepare(tmp_path_factory.mktemp("four"), small_omnigen, 4, vae_batch_size=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """One picture: every step of publishing occurs."""
    return prepare(tmp_path_factory.mktemp("one"), small_omnigen, 1)


@pytest.fixture(scope="module")
def twofold(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Two pictures at two resolutions, in batches of one, so that latents are equal to the byte."""
    folder = tmp_path_factory.mktemp("twofold")
    return prepare(folder, small_omnigen, 2, larger=80, vae_batch_size=1)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Pictures enough for several shards, of a batch or two each."""
    options = {"vae_batch_size": 2, "shard_seconds": 0.02}
    return prepare(tmp_path_factory.mktemp("many"), small_omnigen, 16, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Four pictures in two buckets, in shards of one latent each, however fast the machine is."""
    return prepare(tmp_path_factory.mktemp("small"), small_omnigen, 4, shard_seconds=1e-6)


def _notes(path: Path) -> list[tuple[str, list[str]]]:
    """What `forked.note_encoded` noted: each latent's key and the keys of its batch, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], line.split()[1:]) for line in lines]


def _buckets(here: Effect) -> dict[str, str]:
    rows = here.samples.select(["pixels_key", "bucket"]).to_pylist()
    return {row["pixels_key"]: row["bucket"] for row in rows}


def _check_only_the_open_shard_was_lost(encoded: list[str], before: Effect, after: Effect) -> None:
    """`encoded` are the keys that a killed run put, or began to put, into shards, in order."""
    assert not before.latents.keys() & set(encoded), "what was published was encoded again"
    published = after.latents.keys() - before.latents.keys()
    assert set(encoded[: len(published)]) == published
    buckets = _buckets(after)
    # The last one was perhaps about to close the open shard, being of another bucket.
    lost = encoded[len(published) : -1]
    assert len({buckets[key] for key in lost}) <= 1


@pytest.mark.parametrize("kills", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_encode_vae_killed_at_random_moments(many: Writers, tmp_path: Path, kills: int) -> None:
    """At so many moments, each drawn from the time that an undisturbed run takes."""
    generator = random.Random(7)
    undisturbed = many.workspace("encode-vae", tmp_path / "undisturbed")
    forked.start(undisturbed.root, "--help").ended()  # the server is up, from here on
    notes = tmp_path / "undisturbed.notes"
    start = time.monotonic()
    forked.start(undisturbed.root, "encode-vae", first=_noting(notes)).ended()
    duration = time.monotonic() - start
    batches = dict(_notes(notes))

    left, rounds = kills, 0
    while left:
        rounds += 1
        here = many.workspace("encode-vae", tmp_path / f"round {rounds}")
        now: dict[str, list[str]] = {}
        before = effect(here.root)
        killed = 0
        with Reader(here.root) as reader:
            while True:
                notes = tmp_path / f"{rounds}-{killed}.notes"
                child = forked.start(here.root, "encode-vae", first=_noting(notes))
                # The last run of a round is let come to its end, however busy the machine is.
                if killed < min(left, _KILLS_PER_ROUND) and not child.ends_within(
                    generator.uniform(0, duration)
                ):
                    child.kill()
                ended = child.ended(status=None)
                now |= dict(_notes(notes))
                if ended.status == 0:
                    break
                assert ended.status == KILLED
                killed += 1
                after = effect(here.root)
                encoded = [key for key, _ in _notes(notes)]
                _check_only_the_open_shard_was_lost(encoded, before, after)
                before = after
                unfinished, orphans = leftovers(here.root)
                assert max(len(unfinished), len(orphans)) <= killed
        assert reader.looks > 0
        if killed == 0:  # the machine was busy when the time was taken
            duration *= 0.8
        left -= killed
        check_nothing_twice(here.root)
        check_equal(
            effect(here.root),
            many.expected["encode-vae"],
            same_batch=lambda key, now=now: now[key] == batches[key],
        )


def _noting(notes: Path) -> partial[None]:
    return partial(forked.note_encoded, str(notes))


def _check_killed_at_each_step(
    writer: str,
    writers: Writers,
    folder: Path,
    moments: Iterable[int],
    flushes: bool,
    open_at_once: int = 1,
) -> int:
    """Kill `writer` at each of `moments` of its publishing, until it comes to its end before one,
    and run it again each time; returns how often it was killed.

    So many files are `open_at_once` at most.
    """
    before = effect(writers.ready[writer])
    expected = writers.expected[writer]
    for kills, moment in enumerate(moments):
        here = writers.workspace(writer, folder / str(moment))
        first = forked.both(forked.publish_often, partial(forked.kill_at, moment, flushes))
        ended = forked.start(here.root, writer, first=first).ended(status=None)
        assert ended.status in (0, KILLED), ended.stderr
        killed = ended.status == KILLED
        now = effect(here.root)
        check_whole(here.root)
        check_growing(before, now)
        # A snapshot is the old one or the new one.
        assert any(now.images.equals(one.images) for one in (before, expected))
        assert any(now.samples.equals(one.samples) for one in (before, expected))
        unfinished, orphans = leftovers(here.root)
        assert len(unfinished) <= open_at_once * killed
        assert len(orphans) <= killed
        summary = here.json(writer)
        check_equal(effect(here.root), expected)
        check_nothing_twice(here.root)
        if writer == "discover":
            # What was hashed and published is not opened again.
            assert summary["counts"]["files opened"] == len(expected.files) - len(now.files)
        if not killed:
            assert not summary["changed"]
            return kills
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("writer", WRITERS)
def test_each_writer_killed_whenever_files_appear_or_move(
    writer: str, one: Writers, tmp_path: Path
) -> None:
    kills = _check_killed_at_each_step(writer, one, tmp_path, count(2, 2), flushes=False)
    assert kills >= 2, "a file is written and renamed, at least"


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_each_writer_killed_before_and_after_each_step(
    writer: str, four: Writers, tmp_path: Path
) -> None:
    kills = _check_killed_at_each_step(writer, four, tmp_path, count(1), flushes=True)
    assert kills >= 8, "a file is written, flushed, renamed, and its folder flushed, at least"


@pytest.mark.slow
def test_encode_vae_killed_with_a_shard_open_for_each_resolution(
    twofold: Writers, tmp_path: Path
) -> None:
    """Whatever was published of an image, the next run makes only the rest, each latent once."""
    assert len(twofold.expected["encode-vae"].latents) == 4
    steps = count(2, 2)
    kills = _check_killed_at_each_step(
        "encode-vae", twofold, tmp_path, steps, False, open_at_once=2
    )
    assert kills >= 8, "two tars and two fragments are opened and renamed, at least"


def test_merging_killed_whenever_files_appear_or_move(four: Writers, tmp_path: Path) -> None:
    """tokenize, which here leaves several fragments and then merges them."""
    ready = four.workspace("tokenize", tmp_path / "ready")
    often = forked.both(forked.publish_often, forked.merge_always)
    for moment in count(2, 2):
        here = Project(shutil.copytree(ready.root, tmp_path / str(moment)))
        first = forked.both(often, partial(forked.kill_at, moment, False))
        killed = forked.start(here.root, "tokenize", first=first).ended(status=None).status
        check_whole(here.root)
        check_growing(effect(ready.root), effect(here.root))
        forked.start(here.root, "tokenize", first=often).ended()
        check_equal(effect(here.root), four.expected["tokenize"])
        if killed == 0:
            break
    log = Workspace.open(here.root).prompts
    assert len(log.listing().current) == 1
    assert len(log.listing().replaced) > 1


@pytest.mark.slow
@pytest.mark.parametrize("flushes", [False, True], ids=["files", "every step"])
def test_gc_killed_at_each_step(small: Writers, tmp_path: Path, flushes: bool) -> None:
    """It packs the small shards of a finished workspace, and deletes an orphan and leftovers."""
    ready = small.workspace("tokenize", tmp_path / "ready")
    shard = next(ready.root.glob("latents/*/*.tar"))
    shutil.copy(shard, shard.with_name("0" * 32 + ".tar"))
    (ready.root / "staging" / "left").mkdir(parents=True)
    before = effect(ready.root)
    collect = ("gc", "--yes", "--grace-hours", "0")
    for moment in count(1) if flushes else count(2, 2):
        here = Project(shutil.copytree(ready.root, tmp_path / str(moment)))
        first = partial(forked.kill_at, moment, flushes)
        status = forked.start(here.root, *collect, first=first).ended(status=None).status
        assert status in (0, KILLED)
        check_whole(here.root)
        check_equal(effect(here.root), before)
        here.run(*collect)
        check_equal(effect(here.root), before)
        check_nothing_twice(here.root)
        assert leftovers(here.root) == ([], [])
        assert len(list(here.root.glob("latents/*/*.tar"))) == 2, "one for each bucket"
        if status == 0:
            break
    assert moment > 10, "tars, fragments and removals: there are more steps than that"
