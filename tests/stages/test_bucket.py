"""The bucket stage: every image accounted for, keys, splits, and what a change touches."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stages.bucket
from manifests import schema
from manifests.errors import PipeError, UsageError
from manifests.keys import key
from manifests.query import Source, query
from omnigen_pipe.config import MAX_REPEATS, Config, DatasetOptions, parse
from omnigen_pipe.images import pixels
from omnigen_pipe.images.catalogue import discovered_settings
from omnigen_pipe.images.samples import (
    SAMPLE_OPTIONS,
    current_samples,
    make_samples,
    samples_fingerprint,
    samples_settings,
)
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.template import prompt_key
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary, show
from omnigen_pipe.workspace import Workspace


def image(dataset: str, path: str, width: int | None, height: int | None, **more: Any) -> dict:
    """A row of images; equal `content` means equal bytes."""
    content = more.pop("content", path)
    row = {
        "dataset": dataset,
        "path": path,
        "size": 1000,
        "mtime_ns": 1,
        "content_hash": None if content is None else key(content),
        "format": "JPEG",
        "width": width,
        "height": height,
        "mode": "RGB",
        "frames": 1,
        "captions": [f"a picture called {path}"],
        "caption_path": None,
        "caption_size": None,
        "caption_mtime_ns": None,
        "status": "ok",
        "reason": None,
    }
    return row | more


def rejected(dataset: str, path: str, **more: Any) -> dict:
    row = image(dataset, path, None, None, content=None, status="rejected", reason="is empty")
    return row | more


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.IMAGES.schema)


def workspace(root: Path, *datasets: dict[str, Any], **tables: Any) -> Workspace:
    datasets = tuple({"instance_data_dir": "images", **d} for d in datasets)
    return Workspace(root, parse({"dataset": list(datasets), **tables}, "test"))


def discovered(opened: Workspace, images: pa.Table) -> None:
    """Stand in for discover."""
    opened.images.replace(images, settings=as_text(discovered_settings(opened.config.datasets)))


def bucket(opened: Workspace, rows: list[dict]) -> Summary:
    discovered(opened, table(rows))
    return stages.bucket.run(opened, Progress(quiet=True))


def samples(opened: Workspace) -> list[dict]:
    return opened.samples.read().to_pylist()


MIXED = [
    image("d", "wide.jpg", 3000, 2000),
    image("d", "square.jpg", 1500, 1500),
    image("d", "tiny.jpg", 100, 100),
    image("d", "huge.jpg", 9000, 9000),
    image("d", "strip.jpg", 40000, 800),
    image("d", "low.jpg", 1200, 500),
    rejected("d", "empty.jpg"),
    rejected("d", "movie.gif", content_hash=key("movie"), width=640, height=480, reason="animated"),
]
STRICT = {"id": "d", "minimum_image_size": 512, "maximum_image_size": 8192}


def test_every_image_is_accounted_for_with_a_reason(tmp_path: Path) -> None:
    opened = workspace(tmp_path, STRICT)
    summary = bucket(opened, MIXED)
    found = samples(opened)
    assert sorted(row["path"] for row in found) == sorted(row["path"] for row in MIXED)
    reasons = {row["path"]: (row["status"], row["reason"]) for row in found}
    assert reasons == {
        "wide.jpg": ("ok", None),
        "square.jpg": ("ok", None),
        "tiny.jpg": (
            "filtered",
            "smaller than minimum_image_size = 512 (pixel_area): 100x100",
        ),
        "huge.jpg": (
            "filtered",
            "larger than maximum_image_size = 8192 (pixel_area): 9000x9000",
        ),
        "strip.jpg": (
            "filtered",
            "bucket side over OmniGen's limit of 3072 px: 40000x800 would need the bucket 7232x128",
        ),
        "low.jpg": (
            "filtered",
            "would be upscaled from 1200x500 to 1600x667 for bucket 1600x640; set upscale = "
            "true or lower resolution",
        ),
        "empty.jpg": ("rejected", "is empty"),
        "movie.gif": ("rejected", "animated"),
    }
    assert summary.counts == {
        "images": 8,
        "samples": 2,
        "buckets": 2,
        "filtered": 4,
        "rejected": 2,
    }
    assert sum(summary.left_out.values()) == 6
    assert summary.left_out["d: is empty"] == 1


def test_only_used_samples_have_geometry_and_every_row_has_an_id(tmp_path: Path) -> None:
    opened = workspace(tmp_path, STRICT)
    bucket(opened, MIXED)
    found = samples(opened)
    assert len({row["sample_id"] for row in found}) == len(found)
    for row in found:
        geometry = [
            row[name]
            for name in (
                "bucket", "resize_width", "resize_height", "crop_left", "crop_top", "pixels_key"
            )
        ]  # fmt: skip
        if row["status"] == "ok":
            assert None not in geometry
        else:
            assert geometry == [None] * 6
        assert row["mask_key"] is None


def test_a_second_run_writes_nothing_and_says_so(tmp_path: Path) -> None:
    opened = workspace(tmp_path, STRICT)
    assert bucket(opened, MIXED).changed
    before = opened.samples.path.stat()
    again = stages.bucket.run(opened, Progress(quiet=True))
    assert not again.changed
    assert opened.samples.path.stat().st_ino == before.st_ino
    assert not list(opened.staging.iterdir())


def all_samples(images: pa.Table, config: Config, **options: int) -> pa.Table:
    columns = schema.SAMPLES.schema
    parts = [part.select(columns.names) for part in make_samples(images, config, **options)]
    return pa.concat_tables([schema.SAMPLES.empty(), *(part.cast(columns) for part in parts)])


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "off", "gone"]), names, st.integers(0, 3)),
        max_size=20,
        unique_by=lambda row: row[:2],
    ),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_samples_depend_neither_on_the_order_of_images_nor_on_how_many_are_made_at_once(
    rows: list[tuple[str, str, int]], at_once: int, random: Any
) -> None:
    config = workspace(
        Path("unused"),
        {"id": "a", "crop": True, "crop_style": "random", "crops_per_image": 2},
        {"id": "b", "resolution": 512, "repeats": 3},
        {"id": "off", "disabled": True},
    ).config
    images = [
        rejected(dataset, path)
        if kind == 0
        else image(dataset, path, 1500 + 300 * kind, 1600, content=str(kind))
        for dataset, path, kind in rows
    ]
    straight = all_samples(table(images), config)
    random.shuffle(images)
    assert all_samples(table(images), config, rows=at_once).equals(straight)

    counted = Counter((row["dataset"], row["path"]) for row in straight.to_pylist())
    crops = {"a": 2, "b": 1}
    assert counted == {
        (row["dataset"], row["path"]): crops[row["dataset"]]
        for row in images
        if row["dataset"] in crops
    }
    assert len(set(straight["sample_id"].to_pylist())) == straight.num_rows
    order = [(r["dataset"], r["path"].encode(), r["crop_index"]) for r in straight.to_pylist()]
    assert order == sorted(order)


def test_keys_are_the_ones_the_design_names(tmp_path: Path) -> None:
    opened = workspace(
        tmp_path, {"id": "d", "resolution": 512}, pixels={"alpha_background": "hsl(0, 50%, 50%)"}
    )
    captions = ["a 'quoted' caption, with a comma", "zweite Zeile\nünd mehr", ""]
    bucket(
        opened,
        [
            image("d", "a.jpg", 3000, 2000, captions=captions, content="same"),
            image("d", "b.jpg", 3000, 2000, captions=None, content="same"),
            rejected("d", "z.jpg"),
        ],
    )
    first, second, bad = samples(opened)
    content = key("same")
    policy = pixels.policy(opened.config.pixels)
    assert first["sample_id"] == key("d", content, 0, 0)
    assert second["sample_id"] == key("d", content, 0, 1)
    assert bad["sample_id"] == key("d", "path", "z.jpg", 0)
    assert first["pixels_key"] == key(content, 672, 448, 16, 0, "640x448", policy)
    assert first["pixels_key"] == second["pixels_key"]
    assert first["captions"] == captions
    assert first["prompt_keys"] == [prompt_key(caption) for caption in captions]
    assert second["prompt_keys"] is None


def test_two_resolutions_of_the_same_images(tmp_path: Path) -> None:
    opened = workspace(
        tmp_path, {"id": "d512", "resolution": 512}, {"id": "d1024", "resolution": 1024}
    )
    rows = [image(d, f"{i}.jpg", 3000, 2000 + i) for d in ("d512", "d1024") for i in range(5)]
    summary = bucket(opened, rows)
    found = samples(opened)
    assert summary.counts["samples"] == 10
    assert {(row["dataset"], row["bucket"]) for row in found} == {
        ("d512", "640x448"),
        ("d1024", "1280x832"),
    }
    assert len({row["pixels_key"] for row in found}) == 10
    assert len({row["content_hash"] for row in found}) == 5
    assert len({row["sample_id"] for row in found}) == 10


def test_the_same_geometry_in_two_datasets_is_encoded_once(tmp_path: Path) -> None:
    opened = workspace(tmp_path, {"id": "a"}, {"id": "b", "crop": True, "crop_aspect": "preserve"})
    bucket(
        opened, [image("a", "x.jpg", 2000, 2000), image("b", "y.jpg", 2000, 2000, content="x.jpg")]
    )
    a, b = samples(opened)
    assert a["pixels_key"] == b["pixels_key"]
    assert a["sample_id"] != b["sample_id"]


def test_splits_repeats_and_disabled_datasets(tmp_path: Path) -> None:
    opened = workspace(
        tmp_path,
        {"id": "subject", "repeats": 9},
        {"id": "held-out", "dataset_type": "eval"},
        {"id": "others", "is_regularisation_data": True},
        {"id": "off", "disabled": True},
    )
    ids = ["subject", "held-out", "others", "off", "no-longer-configured"]
    summary = bucket(opened, [image(d, "x.jpg", 2000, 2000) for d in ids])
    assert [(r["dataset"], r["split"], r["repeats"]) for r in samples(opened)] == [
        ("held-out", "eval", 0),
        ("others", "regularisation", 0),
        ("subject", "train", 9),
    ]
    tallied = [(b["split"], b["samples"], b["per_epoch"]) for b in summary.details["buckets"]]
    assert tallied == [("train", 1, 10), ("regularisation", 1, 1), ("eval", 1, 1)]


def test_the_most_repeats_that_may_be_asked_for_are_counted(tmp_path: Path) -> None:
    opened = workspace(tmp_path, {"id": "d", "repeats": MAX_REPEATS})
    rows = [image("d", f"{i}.jpg", 2000, 2000) for i in range(3000)]
    (found,) = bucket(opened, rows).details["buckets"]
    assert found["per_epoch"] == 3000 * (MAX_REPEATS + 1) > 2**31


def test_rejected_images_are_counted_by_kind(tmp_path: Path) -> None:
    opened = workspace(tmp_path, {"id": "d"})
    reasons = [f"too large: {n}x{n} is {n * n:,} pixels" for n in (30000, 40000)]
    rows = [rejected("d", f"{i}.jpg", reason=reason) for i, reason in enumerate(reasons)]
    assert bucket(opened, rows).left_out == {"d: too large": 2}
    assert [row["reason"] for row in samples(opened)] == reasons, "the whole reason is kept"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop_style": "corner", "crop_seed": 3}, "crop_style, crop_seed have"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1]}, "crop_aspect, crop_aspect_bucke"),
        ({"target_downsample_size": 1536}, "target_downsample_size has"),
        ({"target_downsample_size": 1536, "maximum_image_size": 1536}, None),
        ({"crop_style": "center", "crop_aspect": "square"}, None),
        ({"crop_style": "corner", "target_downsample_size": 1536, "crop": True}, None),
        ({}, None),
    ],
)
def test_options_without_effect_are_named(
    tmp_path: Path, options: dict[str, Any], named: str | None
) -> None:
    opened = workspace(tmp_path, {"id": "d", **options})
    notes = bucket(opened, [image("d", "x.jpg", 1600, 1600)]).notes
    if named is None:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"Dataset `d`: {named}")
        assert note.endswith("no effect with crop = false.")


RANDOM = {"id": "d", "crop": True, "crop_style": "random", "crops_per_image": 3}


def test_random_crops_differ_are_reproducible_and_know_nothing_of_other_files(
    tmp_path: Path,
) -> None:
    opened = workspace(tmp_path, RANDOM)
    rows = [image("d", f"{i}.jpg", 4000, 2500) for i in range(20)]
    bucket(opened, rows)
    before = samples(opened)
    assert len(before) == 60
    assert len({row["crop_left"] for row in before}) > 40
    assert len({row["pixels_key"] for row in before}) > 50

    bucket(
        opened, [image("d", "0-before.jpg", 999, 2500), *rows, image("d", "new.jpg", 4000, 2500)]
    )
    after = samples(opened)
    assert [row for row in after if row["path"] in {r["path"] for r in rows}] == before

    other_seed = workspace(tmp_path / "other", RANDOM | {"crop_seed": 1})
    bucket(other_seed, rows)
    assert [r["sample_id"] for r in samples(other_seed)] == [r["sample_id"] for r in before]
    assert [r["crop_left"] for r in samples(other_seed)] != [r["crop_left"] for r in before]


def test_a_renamed_image_keeps_its_keys(tmp_path: Path) -> None:
    opened = workspace(tmp_path, RANDOM)
    bucket(opened, [image("d", "a.jpg", 4000, 2500, content="x")])
    before = [(row["sample_id"], row["pixels_key"]) for row in samples(opened)]
    bucket(opened, [image("d", "folder/b.jpg", 4000, 2500, content="x")])
    assert [(row["sample_id"], row["pixels_key"]) for row in samples(opened)] == before


def test_changing_one_datasets_crop_style_changes_only_its_rows(tmp_path: Path) -> None:
    rows = [image(d, f"{i}.jpg", 4000, 2500) for d in "ab" for i in range(5)]
    square = {"crop": True, "crop_aspect": "square"}
    centred = workspace(tmp_path, {"id": "a", **square}, {"id": "b", **square})
    bucket(centred, rows)
    before = samples(centred)
    cornered = workspace(
        tmp_path, {"id": "a", **square}, {"id": "b", **square, "crop_style": "corner"}
    )
    summary = stages.bucket.run(cornered, Progress(quiet=True))
    after = samples(cornered)
    assert summary.changed
    changed = {r["dataset"] for r, was in zip(after, before, strict=True) if r != was}
    assert changed == {"b"}
    assert {r["sample_id"] for r in after} == {r["sample_id"] for r in before}


def test_the_table_counts_repeats_and_what_is_cropped_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = workspace(tmp_path, {"id": "d", "crop": True, "resolution": 512, "repeats": 1})
    # 1024x512 resized to itself loses half; 2048x512 loses three quarters.
    summary = bucket(opened, [image("d", "a.jpg", 1024, 512), image("d", "b.jpg", 2048, 512)])
    assert summary.details["buckets"] == [
        {
            "split": "train",
            "bucket": "512x512",
            "samples": 2,
            "per_epoch": 4,
            "cropped_away": 62.5,
            "cropped_away_most": 75.0,
        }
    ]
    assert summary.details["cropped_away"] == 62.5
    json.dumps(summary.as_json())
    show(summary)
    printed = capsys.readouterr().out
    assert re.search(r"train\s*│ 512x512\s*│\s*2 │\s*4 │\s*62.5 % │\s*75.0 %", printed)


def test_warns_of_a_bucket_smaller_than_the_batch_with_repeats_that_mend_it(
    tmp_path: Path,
) -> None:
    train = {"train_batch_size": 8}
    rows = [
        *(image("d", f"square{i}.jpg", 1500, 1500) for i in range(8)),
        *(image("d", f"wide{i}.jpg", 3000, 2000) for i in range(3)),
        image("held-out", "tall.jpg", 2000, 3000),
    ]
    held_out = {"id": "held-out", "dataset_type": "eval"}
    opened = workspace(tmp_path, {"id": "d"}, held_out, train=train)
    notes = bucket(opened, rows).notes
    assert len(notes) == 1
    assert "1280x832 has 3 images per epoch" in notes[0]
    assert "train_batch_size = 8" in notes[0]
    assert "aspect_bucket_alignment" in notes[0]
    advised = re.search(r"repeats = (\d+) on dataset `d`", notes[0])
    assert advised is not None

    mended = workspace(tmp_path, {"id": "d", "repeats": int(advised[1])}, held_out, train=train)
    assert stages.bucket.run(mended, Progress(quiet=True)).notes == []
    short = workspace(tmp_path, {"id": "d", "repeats": int(advised[1]) - 1}, held_out, train=train)
    assert len(stages.bucket.run(short, Progress(quiet=True)).notes) == 1


def test_many_small_buckets_are_counted_after_the_first(tmp_path: Path) -> None:
    opened = workspace(
        tmp_path,
        {"id": "d", "resolution": 512, "aspect_bucket_alignment": 16},
        train={"train_batch_size": 2},
    )
    notes = bucket(opened, [image("d", f"{i}.jpg", 1000 + 200 * i, 1000) for i in range(12)]).notes
    assert len(notes) == 6
    assert notes[-1].startswith("7 more buckets")


def test_says_which_dataset_has_no_image_and_when_nothing_is_left(tmp_path: Path) -> None:
    opened = workspace(tmp_path, {"id": "d"}, {"id": "new"})
    notes = bucket(opened, [image("d", "tiny.jpg", 10, 10)]).notes
    assert any("`new`" in note and "instance_data_dir (images)" in note for note in notes)
    assert "No image is left to train on." in notes


def test_asks_for_discover_and_for_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(PipeError, match="run `omnigen-pipe discover` first") as raised:
        stages.bucket.run(workspace(tmp_path, {"id": "d"}), Progress(quiet=True))
    assert raised.value.exit_status == 1
    with pytest.raises(UsageError, match="dataset"):
        stages.bucket.run(workspace(tmp_path), Progress(quiet=True))


@pytest.mark.parametrize(
    "change",
    [
        {"caption_strategy": "instanceprompt", "instance_prompt": "a photo"},
        {"instance_data_dir": "elsewhere"},
        {"animated": "first"},
    ],
)
def test_options_that_discover_reads_ask_for_discover(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    opened = workspace(tmp_path, {"id": "a"}, {"id": "b"})
    bucket(opened, [image("a", "x.jpg", 2000, 2000), image("b", "y.jpg", 2000, 2000)])
    edited = workspace(tmp_path, {"id": "a"}, {"id": "b", **change})
    option, value = next(iter(change.items()))
    message = f"{option} of dataset b: .* → {value}.*: run `omnigen-pipe discover`"
    with pytest.raises(PipeError, match=message) as raised:
        stages.bucket.run(edited, Progress(quiet=True))
    assert raised.value.exit_status == 1
    with pytest.raises(PipeError, match=message):
        current_samples(edited)
    assert not stages.bucket.run(opened, Progress(quiet=True)).changed, "and back again is free"


def datasets_of(samples: Source) -> list[str]:
    found: list[str] = query("SELECT dataset FROM samples", samples=samples)["dataset"].to_pylist()
    return found


def test_datasets_that_come_and_go(tmp_path: Path) -> None:
    both = workspace(tmp_path, {"id": "a"}, {"id": "b"})
    bucket(both, [image("a", "x.jpg", 2000, 2000), image("b", "y.jpg", 2000, 2000)])
    for fewer in (
        workspace(tmp_path, {"id": "b"}),
        workspace(tmp_path, {"id": "a", "disabled": True, "animated": "first"}, {"id": "b"}),
    ):
        stages.bucket.run(fewer, Progress(quiet=True))
        assert datasets_of(current_samples(fewer)) == ["b"]
    more = workspace(tmp_path, {"id": "a"}, {"id": "b"}, {"id": "c"}, {"id": "d"})
    with pytest.raises(
        PipeError, match=r"c is new; dataset d is new.*: run `omnigen-pipe discover`"
    ):
        stages.bucket.run(more, Progress(quiet=True))


def test_samples_of_other_images_ask_for_bucket(tmp_path: Path) -> None:
    opened = workspace(tmp_path, {"id": "a"}, {"id": "off", "disabled": True})
    first, second = image("a", "x.jpg", 2000, 2000), image("a", "y.jpg", 2000, 2000)
    bucket(opened, [first])
    assert datasets_of(current_samples(opened)) == ["a"]
    for rows in ([first, second], [{**first, "captions": ["edited"]}], []):
        discovered(opened, table(rows))
        with pytest.raises(PipeError, match=r"other images .* run `omnigen-pipe bucket`") as raised:
            current_samples(opened)
        assert raised.value.exit_status == 1
    discovered(opened, table([{**first, "mtime_ns": 2}, image("off", "z.jpg", 100, 100)]))
    assert datasets_of(current_samples(opened)) == ["a"], "what samples do not depend on may change"


def test_rows_of_images_are_hashed_again_only_where_the_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = workspace(tmp_path, {"id": "a"})
    row = image("a", "x.jpg", 2000, 2000)
    bucket(opened, [row])
    asked: list[str] = []

    def counted(*given: Any) -> str:
        asked.append(samples_fingerprint(*given))
        return asked[-1]

    monkeypatch.setattr("omnigen_pipe.images.samples.samples_fingerprint", counted)
    assert datasets_of(current_samples(opened)) == ["a"]
    assert not asked
    # The same rows in other bytes, and other rows beside the same metadata.
    discovered(opened, table([{**row, "mtime_ns": 2}]))
    assert datasets_of(current_samples(opened)) == ["a"]
    held = pq.read_table(opened.images.path)
    edited = held.set_column(
        held.column_names.index("width"), "width", pa.array([1999], pa.int32())
    )
    pq.write_table(edited, opened.images.path)
    with pytest.raises(PipeError, match="other images"):
        current_samples(opened)
    assert len(asked) == 2


def test_settings_name_what_samples_depend_on_and_nothing_else(tmp_path: Path) -> None:
    def of(*datasets: dict[str, Any], **tables: Any) -> str:
        return as_text(samples_settings(workspace(tmp_path, *datasets, **tables).config))

    base = of({"id": "a"}, {"id": "b"})
    assert of({"id": "b"}, {"id": "a"}) == base
    assert of({"id": "a"}, {"id": "b"}, {"id": "c", "disabled": True}) == base
    assert of({"id": "a"}, {"id": "b"}, train={"train_batch_size": 8}) == base
    others = [
        of({"id": "a"}),
        of({"id": "a"}, {"id": "b", "dataset_type": "eval"}),
        of({"id": "a", "crop_seed": 1}, {"id": "b"}),
        of({"id": "a", "repeats": 1}, {"id": "b"}),
        of({"id": "a"}, {"id": "b"}, pixels={"decode": "reduced"}),
    ]
    assert len({base, *others}) == 6

    opened = workspace(tmp_path, {"id": "a"}, {"id": "b"})
    bucket(opened, [image("a", "x.jpg", 2000, 2000)])
    assert opened.samples.metadata()["settings"] == base


def test_every_option_of_a_dataset_is_either_of_samples_or_of_images() -> None:
    read_by_discover = {
        "caption_strategy",
        "caption_column",
        "path_column",
        "instance_prompt",
        "prepend_instance_prompt",
        "textfile_lines",
        "animated",
        "maximum_pixels",
    }
    assert set(SAMPLE_OPTIONS) | read_by_discover == set(DatasetOptions.model_fields)
    assert not set(SAMPLE_OPTIONS) & read_by_discover


def test_a_hundred_thousand_images(tmp_path: Path) -> None:
    number = 100_000
    random = np.random.default_rng(0)
    rows = table([]).schema.names
    columns = {name: pa.nulls(number, schema.IMAGES.schema.field(name).type) for name in rows}
    columns |= {
        "dataset": pa.array(np.where(random.random(number) < 0.5, "a", "b")),
        "path": pa.array([f"{i}.jpg" for i in range(number)]),
        "content_hash": pa.array([f"{i:032x}" for i in range(number)]),
        "width": pa.array(random.integers(300, 6000, number), pa.int32()),
        "height": pa.array(random.integers(300, 6000, number), pa.int32()),
        "captions": pa.array([[f"picture {i}"] for i in range(number)]),
        "status": pa.array(["ok"] * number),
    }
    opened = workspace(tmp_path, {"id": "a", "resolution": 512}, RANDOM | {"id": "b"})
    discovered(opened, pa.table(columns))
    summary = stages.bucket.run(opened, Progress(quiet=True))
    found = opened.samples.read()
    in_b = int(np.sum(columns["dataset"].to_numpy(zero_copy_only=False) == "b"))
    assert found.num_rows == number - in_b + 3 * in_b
    ids = found["sample_id"].to_numpy()
    assert len(np.unique(ids)) == found.num_rows
    assert summary.counts["images"] == number
    used = sum(b["samples"] for b in summary.details["buckets"])
    assert used == summary.counts["samples"] > number
