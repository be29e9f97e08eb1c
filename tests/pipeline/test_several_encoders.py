"""Several encoders at once in one workspace: together they do what one does, to the byte."""

from __future__ import annotations

import fcntl
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import forked
import pytest
from effect import Reader, check_equal, check_whole, effect, leftovers
from forked import Child
from pipeline_project import Project
from writers import Writers, prepare

from omnigen_pipe.workspace import Workspace

#: Two processes that share nothing but the workspace.
PLAIN = ([], [])

#: Two that share the work out.
WORKERS = (["--worker", "1/2"], ["--worker", "2/2"])

#: Far more runs of `gc` than an encoder needs time to publish its first shards.
COLLECTIONS = 200


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """A dozen pictures in two buckets; batches of one, so that latents are equal to the byte, and
    nearly every latent in a shard of its own."""
    options = {"vae_batch_size": 1, "shard_seconds": 0.001}
    return prepare(tmp_path_factory.mktemp("several"), small_omnigen, 12, **options)


def _start(here: Project, encoders: Sequence[Sequence[str]]) -> list[Child]:
    """One `encode-vae` for each list of further arguments, all at once."""
    return [forked.start(here.root, "encode-vae", "--json", *more) for more in encoders]


def _check_as_one(here: Project, writers: Writers) -> None:
    """Fail unless the workspace holds what one undisturbed process would have made of it."""
    check_whole(here.root)
    check_equal(effect(here.root), writers.expected["encode-vae"])
    again = here.json("encode-vae")
    assert not again["changed"], "nothing is left to do"


@pytest.mark.parametrize("encoders", [PLAIN, WORKERS], ids=["plain", "workers"])
def test_together_they_do_what_one_does(
    writers: Writers, tmp_path: Path, encoders: Sequence[Sequence[str]]
) -> None:
    here = writers.workspace("encode-vae", tmp_path / "workspace")
    with Reader(here.root):
        summaries = [child.json() for child in _start(here, encoders)]
    wanted = len(writers.expected["encode-vae"].latents)
    for summary in summaries:
        counts = summary["counts"]
        assert counts["encoded"] + counts["already there"] <= wanted
        assert not summary["failed"]
    encoded = sum(summary["counts"]["encoded"] for summary in summaries)
    assert encoded == wanted if encoders is WORKERS else encoded >= wanted
    assert leftovers(here.root) == ([], [])
    _check_as_one(here, writers)


@pytest.mark.parametrize("encoders", [PLAIN, WORKERS], ids=["plain", "workers"])
def test_one_is_killed_and_the_others_end_well(
    writers: Writers, tmp_path: Path, encoders: Sequence[Sequence[str]]
) -> None:
    here = writers.workspace("encode-vae", tmp_path / "workspace")
    with Reader(here.root):
        killed, *others = _start(here, encoders)
        # Killed when something is published, by whichever of them.
        while not effect(here.root).latents and not killed.ends_within(0):
            pass
        killed.kill()
        for child in others:
            child.ended()
        killed.ended(status=None)
        here.run("encode-vae")  # what the killed one alone would have done
    unfinished, orphans = leftovers(here.root)
    assert max(len(unfinished), len(orphans)) <= 1
    _check_as_one(here, writers)


def test_gc_again_and_again_beside_encoders_and_readers(writers: Writers, tmp_path: Path) -> None:
    here = writers.workspace("encode-vae", tmp_path / "workspace")

    def collect() -> int:
        collected = forked.start(here.root, "gc", "--yes", "--json").json()
        found: int = collected["counts"]["shards given up"]
        return found

    gate = tmp_path / "gate"
    gate.touch()
    given_up = 0
    with Reader(here.root) as reader:
        with gate.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            wait = partial(forked.hold_before_batch, 5, str(gate))
            # The second one has most of the pictures. However fast they are, something is
            # packed while it runs.
            small, large = (["encode-vae", "--json", *worker] for worker in WORKERS)
            encoders = [
                forked.start(here.root, *small),
                forked.start(here.root, *large, first=wait),
            ]
            for _ in range(COLLECTIONS):
                given_up += collect()
                if given_up:
                    break
            assert given_up > 0, "nothing was packed while they ran"
            assert not encoders[1].ends_within(0)
        while not all(child.ends_within(0) for child in encoders):
            collect()
        for child in encoders:
            child.ended()
        here.run("gc", "--yes")
    assert reader.looks > 0
    _check_as_one(here, writers)
    rows = Workspace.open(here.root).latents.read()
    assert rows.num_rows == len(writers.expected["encode-vae"].latents), "packed, each once"


@pytest.mark.slow
def test_encoders_that_come_and_are_killed_at_random(writers: Writers, tmp_path: Path) -> None:
    """Three at a time; one of them is killed, again and again, and another takes its place."""
    generator = random.Random(11)
    for number in range(6):
        here = writers.workspace("encode-vae", tmp_path / f"workspace {number}")
        with Reader(here.root):
            children = _start(here, [[], [], []])
            for _ in range(4):
                victim = children.pop(generator.randrange(len(children)))
                if not victim.ends_within(generator.uniform(0, 0.6)):
                    victim.kill()
                assert victim.ended(status=None).status in (0, -9)
                children += _start(here, [[]])
            for child in children:
                child.ended()
        _check_as_one(here, writers)
