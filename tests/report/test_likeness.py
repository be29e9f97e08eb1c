"""Images that are there more than once: each file counts once, and leaks name both sides."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import QUIET, filed, image, picture, publish, workspace
from PIL import Image

from omnigen_pipe.images.sources import reachable_roots
from omnigen_pipe.report import of_workspace
from omnigen_pipe.report.likeness import Group, Likeness, both_sides, grouped, likeness
from omnigen_pipe.report.of_workspace import Options
from omnigen_pipe.report.thumbnails import Album
from omnigen_pipe.workspace import Workspace


def dataset(name: str, folder: str, **options: Any) -> dict[str, Any]:
    small = {"resolution": 64, "resolution_type": "pixel", "aspect_bucket_alignment": 16}
    return {"id": name, "instance_data_dir": folder, **small, **options}


def place_of(root: Path) -> Workspace:
    return workspace(root, dataset("a", "a"), dataset("held", "held", dataset_type="eval"))


def found(place: Workspace, limit: int = 100) -> Likeness:
    return likeness(place, QUIET, reachable_roots(place), Album(10**7), limit, 0)


def brighter(shown: Image.Image, by: int) -> Image.Image:
    return shown.point(lambda value: min(255, value + by))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(2, 8))
def test_both_sides_are_named_and_no_place_is_left_empty(
    evaluated: int, trained: int, most: int
) -> None:
    ones, others = [("eval", n) for n in range(evaluated)], [("train", n) for n in range(trained)]
    shown = both_sides(ones, others, most)
    assert len(shown) == min(most, evaluated + trained)
    assert shown == sorted(shown)
    assert {side for side, _ in shown} == {side for side, _ in ones + others}


def sides(group: Group) -> list[str]:
    return [member.split for member in group.members]


def test_a_leak_of_many_names_files_that_are_evaluated_and_trained_on(tmp_path: Path) -> None:
    place, base = place_of(tmp_path), picture(3, (64, 64))
    rows = [filed(place, d, f"{n}.png", base) for d in ("a", "held") for n in range(8)]
    publish(place, rows)
    (group,) = found(place).same.groups
    assert (group.count, group.more, group.leaks) == (16, 10, True)
    assert sides(group) == ["eval"] * 3 + ["train"] * 3
    rows = [
        filed(place, d, f"{n}.png", brighter(base, n + 8 * (d == "a")))
        for d in ("a", "held")
        for n in range(8)
    ]
    publish(place, rows)
    (group,) = found(place).near.groups
    assert (group.count, group.more, group.leaks) == (16, 10, True)
    assert sides(group) == ["eval"] * 3 + ["train"] * 3


def test_a_look_that_is_trained_on_by_the_same_bytes_is_named_so(tmp_path: Path) -> None:
    place, base = place_of(tmp_path), picture(3, (64, 64))
    publish(place, [
        filed(place, "held", "one.png", base), filed(place, "a", "copy.png", base),
        filed(place, "held", "two.png", brighter(base, 3)),
    ])  # fmt: skip
    (group,) = found(place).near.groups
    assert (group.count, group.more, group.leaks) == (2, 0, True)
    assert sorted(sides(group)) == ["eval", "eval", "train"]
    assert [m.path for m in group.members if m.split == "train"] == ["copy.png"]


def test_many_evaluated_images_leave_room_for_those_that_are_trained_on(tmp_path: Path) -> None:
    """A leak is found although the evaluated images alone would fill the limit."""
    place, base = place_of(tmp_path), picture(3, (64, 64))
    rows = [filed(place, "held", f"{n}.png", brighter(base, n)) for n in range(6)]
    rows.append(filed(place, "a", "one.png", brighter(base, 6)))
    publish(place, rows)
    assert [found(place, limit).near.leaking for limit in (2, 4, 7)] == [1, 3, 6]


@pytest.mark.parametrize(("evaluated", "trained", "share"), [(9, 9, 3), (2, 9, 2), (9, 1, 5)])
def test_the_evaluated_ones_are_half_unless_there_are_too_few(
    tmp_path: Path, evaluated: int, trained: int, share: int
) -> None:
    place, base = place_of(tmp_path), picture(3, (64, 64))
    rows = [filed(place, "held", f"{n}.png", brighter(base, n)) for n in range(evaluated)]
    # Not like any other, so that the group holds the evaluated ones alone.
    rows += [filed(place, "a", f"{n}.png", picture(50 + n, (64, 64))) for n in range(trained)]
    publish(place, rows)
    compared = found(place, 6)
    assert compared.hashed == 6
    assert compared.near.surplus == share - 1


def test_the_page_speaks_of_the_compared_ones_where_not_all_are(tmp_path: Path) -> None:
    place, base = place_of(tmp_path), picture(3, (64, 64))
    rows = [filed(place, "held", f"{n}.png", brighter(base, n)) for n in range(2)]
    rows += [filed(place, "a", f"{n}.png", picture(50 + n, (64, 64))) for n in range(6)]
    publish(place, rows)

    def page(limit: int) -> str:
        of_workspace.write(place, QUIET, Options(decoded=0, hash_limit=limit))
        return (tmp_path / "inspect.html").read_text("utf-8")

    part, whole = page(4), page(8)
    assert "Among the compared no group is both trained on and evaluated on." in part
    assert "beyond the first of each, among the compared" in part
    assert "No group is both trained on and evaluated on." in whole
    assert "among the compared" not in whole.lower()
    assert "None among the compared." in page(1)
    (tmp_path / "a" / "0.png").unlink()
    assert "Among the compared no group" in page(8)


def test_a_file_of_several_datasets_is_no_copy_of_itself(tmp_path: Path) -> None:
    """Two of one folder, and one of a folder in it; by a link and by another path too."""
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    place = workspace(
        tmp_path, dataset("a", "a"), dataset("b", "a/in/.."), dataset("c", "a/in"),
        dataset("d", "link"),
        dataset("gone-1", "gone"), dataset("gone-2", "gone"),
    )  # fmt: skip
    one, two = (filed(place, "a", path, picture(3, (64, 64))) for path in ("1.png", "in/2.png"))
    rows = [{**one, "dataset": name} for name in ("a", "b", "d")]
    rows += [{**two, "dataset": name} for name in ("a", "b", "d")]
    rows.append({**two, "dataset": "c", "path": "2.png"})
    lost = image("gone-1", "3.png")
    publish(place, [*rows, lost, {**lost, "dataset": "gone-2"}])
    copies = found(place).same
    assert (copies.number, copies.surplus) == (1, 1)
    named = [f"{m.dataset}: {m.path}" for m in copies.groups[0].members]
    assert named == ["a: 1.png", "a: in/2.png"]


def test_a_file_that_is_trained_and_evaluated_on_leaks(tmp_path: Path) -> None:
    place = workspace(tmp_path, dataset("a", "a"), dataset("held", "a", dataset_type="eval"))
    one = filed(place, "a", "1.png", picture(3, (64, 64)))
    publish(place, [one, {**one, "dataset": "held"}])
    copies = found(place).same
    assert (copies.number, copies.leaking) == (1, 1)
    assert sides(copies.groups[0]) == ["eval", "train"]


def test_colours_are_compared_in_blocks() -> None:
    """Many images take little more memory than their colours, whether all differ or none does."""
    count = 6_000
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, count, np.uint64, endpoint=False)
    for each in (hashes, np.zeros(count, np.uint64)):
        colours = np.zeros((count, 16, 16, 3), np.uint8)
        tracemalloc.start()
        names = grouped(each, colours)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(np.unique(names)) == len(np.unique(each))
        assert most < 2 * colours.nbytes
