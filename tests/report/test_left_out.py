"""Every image is counted once, whatever became of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from made import image, publish, workspace

from omnigen_pipe.report.left_out import MOST_CAUSES, left_out

DATASETS: tuple[dict[str, Any], ...] = (
    {"id": "a", "instance_data_dir": "a", "resolution": 64, "minimum_image_size": 40,
     "resolution_type": "pixel", "crops_per_image": 2, "crop": True, "crop_style": "random"},
    {"id": "b", "instance_data_dir": "b", "resolution": 512, "resolution_type": "pixel",
     "dataset_type": "eval", "upscale": False},
)  # fmt: skip

ROWS = st.lists(
    st.tuples(
        st.sampled_from(("a", "b", "gone")),
        st.integers(1, 700),
        st.integers(1, 700),
        st.sampled_from((None, "no caption: it is empty", "truncated: at byte 7", "no: such: x")),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_every_image_has_one_state_and_every_one_left_out_a_cause(
    rows: list[tuple[str, int, int, str | None, bool]],
) -> None:
    images = [
        image(
            dataset, f"{number}.png", width=width, height=height,
            status="rejected" if reason else "ok", reason=reason,
        )
        for number, (dataset, width, height, reason, _) in enumerate(rows)
    ]  # fmt: skip
    with TemporaryDirectory() as folder:
        place = workspace(Path(folder), *DATASETS)
        # Some come after bucket has run, some go after it.
        publish(place, [row for row, (*_, early) in zip(images, rows, strict=True) if early])
        publish(place, images, bucketed=False)
        found = left_out(place)
        samples = place.samples.read().to_pylist()

    states = ("used", "filtered", "rejected", "waiting")
    assert found.images == len(images)
    assert sum(found.total(state) for state in states) == len(images)
    for row in found.datasets:
        assert row["images"] == sum(row[state] for state in states)
    used = {(row["dataset"], row["path"]) for row in samples if row["status"] == "ok"}
    assert found.total("used") == len(used)
    causes = sum(cause["images"] for cause in found.causes) + found.others
    assert causes == len(images) - found.total("used")
    late = [row for row, (*_, early) in zip(images, rows, strict=True) if not early]
    late += [row for row, (*_, early) in zip(images, rows, strict=True)
             if early and row["dataset"] == "gone"]  # fmt: skip
    assert found.total("waiting") == sum(row["status"] == "ok" for row in late)
    for cause in found.causes:
        assert 1 <= len(cause["examples"]) <= cause["images"]


def test_a_cause_is_a_reason_without_what_is_peculiar_to_an_image(tmp_path: Path) -> None:
    place = workspace(tmp_path, *DATASETS)
    publish(
        place,
        [image("a", f"{n}.png", width=20 + n, height=30) for n in range(7)]
        + [image("b", f"{n}.png", width=200 + n, height=300) for n in range(3)]
        + [image("b", "x.png", status="rejected", reason="no caption: x.txt is empty")],
    )
    found = left_out(place)
    assert Counter({(c["dataset"], c["cause"]): c["images"] for c in found.causes}) == Counter(
        {
            ("a", "smaller than minimum_image_size = 40 (pixel)"): 7,
            ("b", "would be upscaled; set upscale = true or lower resolution"): 3,
            ("b", "no caption"): 1,
        }
    )
    assert found.causes[0]["examples"][0]["reason"].endswith("20x30")


def test_rare_causes_are_counted_as_one(tmp_path: Path) -> None:
    place = workspace(tmp_path, *DATASETS)
    rows = [
        image("a", f"{n}.png", status="rejected", reason=f"cause {n}")
        for n in range(MOST_CAUSES + 5)
    ]
    publish(place, rows)
    found = left_out(place)
    assert (len(found.causes), found.others) == (MOST_CAUSES, 5)


def test_samples_of_images_that_are_gone_are_told(tmp_path: Path) -> None:
    place = workspace(tmp_path, *DATASETS)
    publish(place, [image("b", "1.png", width=600, height=600), image("b", "2.png")])
    publish(place, [image("b", "2.png")], bucketed=False)
    found = left_out(place)
    assert (found.images, found.gone) == (1, 1)
