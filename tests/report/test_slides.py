"""Validation pictures over steps: which are shown where there are many."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from made import run, workspace

from omnigen_pipe.report import slides as of_slides
from omnigen_pipe.report.slides import MOST_PICTURES, MOST_STEPS, slides, spread
from omnigen_pipe.report.thumbnails import Album


@given(st.sets(st.integers(0, 10_000), min_size=1), st.integers(2, 30))
def test_few_of_many_steps_with_both_ends(steps: set[int], most: int) -> None:
    every = sorted(steps)
    found = spread(every, most)
    assert len(found) == min(len(every), most)
    assert found == sorted(set(found))
    assert {found[0], found[-1]} == {every[0], every[-1]}


@given(st.integers(1, 50))
def test_where_room_ends_the_steps_that_are_left_are_all_over(count: int) -> None:
    order = of_slides._from_the_ends(list(range(count)))
    assert sorted(order) == list(range(count))
    assert order[0] == count - 1
    for kept in range(2, count + 1):
        places = sorted(order[:kept])
        gaps = [b - a for a, b in pairwise(places)]
        assert places[0] == 0
        assert max(gaps) <= 4 * -(-count // kept)


def test_pictures_come_by_name_and_step(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    folder = run(place, "r", 1, {"cat-64x48": [0, 100, 200, 300], "dog-64x48": [200]}, "a <b>")
    (folder / "validation" / "step-000100" / "cat-64x48.png").write_bytes(b"no picture")
    (folder / "validation" / "elsewhere").mkdir()
    found, others = slides(folder, 200, Album(10**6))
    assert [(one.name, one.steps, one.prompt) for one in found] == [
        ("cat-64x48", 3, "a <b>"),
        ("dog-64x48", 1, "a <b>"),
    ]
    cat = found[0].slides
    assert [slide.step for slide in cat] == [0, 100, 200]
    assert [slide.uri is None for slide in cat] == [False, True, False]
    assert "cannot be read as PNG" in (cat[1].problem or "")
    assert others == 0


def test_many_steps_and_pictures_are_thinned(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    names = {f"p{n:02d}": [1] for n in range(MOST_PICTURES)}
    folder = run(place, "r", 1, {"a": list(range(MOST_STEPS + 7)), **names})
    found, others = slides(folder, 999, Album(10**7))
    assert (len(found), others) == (MOST_PICTURES, 1)
    assert (len(found[0].slides), found[0].steps) == (MOST_STEPS, MOST_STEPS + 7)


def test_a_full_album_keeps_the_last_step_of_every_picture(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    steps = list(range(8))
    folder = run(place, "r", 1, {"a": steps, "b": steps})
    whole = Album(10**7)
    slides(folder, 7, whole)
    album = Album(whole.used // 3)
    found, _ = slides(folder, 7, album)
    assert all(one.slides[-1].step == 7 for one in found)
    assert album.refused == 16 - sum(len(one.slides) for one in found) > 0
