"""Histograms: no image is lost between two bars."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from made import image, publish, workspace

from omnigen_pipe.report.shapes import MOST_BUCKETS, shapes

DATASETS = (
    {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
     "aspect_bucket_alignment": 16, "crop": True, "crop_aspect": "square"},
    {"id": "b", "instance_data_dir": "b", "resolution": 64, "resolution_type": "pixel",
     "aspect_bucket_alignment": 16, "dataset_type": "eval"},
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 20_000), st.integers(1, 20_000)),
        max_size=25,
    )
)
def test_every_histogram_adds_up(rows: list[tuple[str, int, int]]) -> None:
    with TemporaryDirectory() as folder:
        place = workspace(Path(folder), *DATASETS)
        publish(
            place,
            [image(d, f"{n}.png", width=w, height=h) for n, (d, w, h) in enumerate(rows)]
            + [image("a", "unread.png", width=None, height=None, status="rejected")],
        )
        found = shapes(place)
        used = [row for row in place.samples.read().to_pylist() if row["status"] == "ok"]
    for bars, count in (
        (found.aspects, len(rows)), (found.sizes, len(rows)),
        (found.bars, len(used)), (found.cropped, len(used)),
    ):  # fmt: skip
        assert sum(bar.count for bar in bars) == count
    assert found.buckets == len({row["bucket"] for row in used})
    for bar in found.bars:
        assert sum(bar.parts.values()) == bar.count
    assert {bar.label: bar.count for bar in found.bars} == {
        bucket: sum(row["bucket"] == bucket for row in used)
        for bucket in {row["bucket"] for row in used}
    }


def test_places_are_those_of_the_images(tmp_path: Path) -> None:
    place = workspace(tmp_path, *DATASETS)
    sizes = [(1000, 1000), (2000, 1000), (1000, 4000), (9000, 100)]
    publish(place, [image("b", f"{n}.png", width=w, height=h) for n, (w, h) in enumerate(sizes)])
    found = shapes(place)
    assert {bar.label for bar in found.aspects if bar.count} == {
        "1:1", "2:1", "1:4 and more", "4:1 and more"
    }  # fmt: skip
    assert {bar.label: bar.count for bar in found.sizes if bar.count} == {
        "1–2 MP": 1, "2–4 MP": 1, "4–8 MP": 1, "1/2–1 MP": 1
    }  # fmt: skip


def test_rare_buckets_share_a_bar(tmp_path: Path) -> None:
    place = workspace(tmp_path, *DATASETS)
    rows = [image("b", f"{n}.png", width=64 + 16 * n, height=64) for n in range(MOST_BUCKETS + 4)]
    publish(place, rows)
    found = shapes(place)
    assert found.buckets == MOST_BUCKETS + 4
    assert (found.bars[-1].label, found.bars[-1].count) == ("4 other buckets", 4)
