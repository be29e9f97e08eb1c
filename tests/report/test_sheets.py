"""Contact sheets: the box lies over what is cropped, and every bucket has its share."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from made import filed, image, picture, publish, workspace
from PIL import Image, ImageChops

from omnigen_pipe.images.sources import reachable_roots
from omnigen_pipe.maintenance.explanation import Keys
from omnigen_pipe.report.page import render
from omnigen_pipe.report.sheets import MOST_SHEETS, crop_box, draw
from omnigen_pipe.report.thumbnails import Album

ROOM = 10**8


def sheets(place: Any, samples: int = 8, seed: int = 0, room: int = ROOM) -> Any:
    return draw(place, reachable_roots(place), Album(room), samples, seed, Keys())


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.integers(0, 99), st.data())
def test_the_box_is_the_crop_in_percent(
    across: int, down: int, left: int, top: int, data: st.DataObject
) -> None:
    bucket = (16 * across, 16 * down)
    resize = tuple(
        side + offset + data.draw(st.integers(0, 50))
        for side, offset in zip(bucket, (left, top), strict=True)
    )
    box = crop_box(
        {
            "bucket": f"{bucket[0]}x{bucket[1]}", "resize_width": resize[0],
            "resize_height": resize[1], "crop_left": left, "crop_top": top,
        }
    )  # fmt: skip
    found = [
        box.left * resize[0], box.top * resize[1], box.width * resize[0], box.height * resize[1]
    ]  # fmt: skip
    assert [round(value / 100) for value in found] == [left, top, *bucket]
    assert max(box.left + box.width, box.top + box.height) <= 100 + 1e-9


@pytest.mark.parametrize("size", [(320, 128), (128, 320), (300, 128), (129, 128)])
@pytest.mark.parametrize("style", ["center", "corner", "random"])
def test_the_box_lies_where_the_crop_shows_it(
    tmp_path: Path, size: tuple[int, int], style: str
) -> None:
    """An image that is white where Pillow crops it, and black elsewhere, is white in the box."""
    options = {"crop": True, "crop_aspect": "square", "crop_style": style}
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 128, "resolution_type": "pixel",
         "crop_seed": 3, **options},
    )  # fmt: skip
    # The crop is a function of size and content: paint it first into a picture of that content.
    first = filed(place, "a", "one.png", Image.new("RGB", size))
    publish(place, [first])
    row = place.samples.read().to_pylist()[0]
    assert (row["resize_width"], row["resize_height"]) == size
    painted = Image.new("RGB", size)
    width, height = (int(side) for side in row["bucket"].split("x"))
    corner = (row["crop_left"], row["crop_top"])
    painted.paste(Image.new("RGB", (width, height), "white"), corner)
    second = filed(place, "a", "one.png", painted)
    # Random crops depend on the content: keep the crop of the first, as the manifest may say it.
    publish(place, [second])
    samples = place.samples.read().to_pylist()
    samples[0] |= {"crop_left": corner[0], "crop_top": corner[1]}
    place.samples.replace(pa.Table.from_pylist(samples, schema=place.samples.manifest.schema))
    (card,) = sheets(place).cards
    assert card.uri is not None
    shown = np.asarray(decoded(card.uri).convert("L"), np.float64)
    assert shown.shape == card.size[::-1]
    rows, columns = np.mgrid[: shown.shape[0], : shown.shape[1]] + 0.5
    x, y = 100 * columns / shown.shape[1], 100 * rows / shown.shape[0]
    box = card.box
    inside = (x > box.left) & (x < box.left + box.width)
    inside &= (y > box.top) & (y < box.top + box.height)
    # A column at the edge may be half of each.
    edge = 100 * 1.5 / min(card.size)
    deep = (x > box.left + edge) | (box.left == 0)
    deep &= (x < box.left + box.width - edge) | (box.left + box.width > 99.9)
    deep &= (y > box.top + edge) | (box.top == 0)
    deep &= (y < box.top + box.height - edge) | (box.top + box.height > 99.9)
    assert shown[inside & deep].min() > 200
    far = (x < box.left - edge) | (x > box.left + box.width + edge)
    far |= (y < box.top - edge) | (y > box.top + box.height + edge)
    assert shown[far].max(initial=0) < 55


def masked(tmp_path: Path, mask: Image.Image, folder: str) -> Any:
    """The card of a picture of 256x128 px, of which the middle is cropped; `mask` lies over it."""
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 128, "resolution_type": "pixel",
         "crop": True, "crop_aspect": "square", "mask": folder},
    )  # fmt: skip
    shown = picture(1, (256, 128))
    if folder == "alpha":
        shown.putalpha(mask)
        row = filed(place, "a", "one.png", shown)
        row["mask_hash"] = row["content_hash"]
    else:
        file = place.root / folder / "one.png"
        file.parent.mkdir()
        mask.save(file)
        digest = blake3(file.read_bytes()).hexdigest()[:32]
        row = filed(place, "a", "one.png", shown, mask_path="one.png", mask_hash=digest)
    publish(place, [row])
    (card,) = sheets(place).cards
    return place, card


def black_to(column: int) -> Image.Image:
    """A mask of 256x128 px that is black left of `column`."""
    mask = Image.new("L", (256, 128), 255)
    mask.paste(0, (0, 0, column, 128))
    return mask


@pytest.mark.parametrize("folder", ["masks", "alpha"])
def test_what_a_mask_leaves_out_of_the_crop_is_red(tmp_path: Path, folder: str) -> None:
    """The crop begins at 64, so that 32 of its 128 columns do not count; where the mask is the
    other way round, that is seen."""
    _, card = masked(tmp_path / "right", black_to(96), folder)
    assert card.veil.mean == 0.75
    veil = Image.open(io.BytesIO(base64.b64decode(card.veil.uri.split(",")[1])))
    opacity = np.asarray(veil.getchannel("A"))
    assert opacity.shape == (16, 16)
    assert opacity[:, :4].min() > 100
    assert opacity[:, 4:].max() == 0
    page = render("card.html.jinja", card=card, bucket="128x128")
    assert "75.0 % counts" in page
    assert card.veil.uri in page
    _, inverted = masked(tmp_path / "wrong", ImageChops.invert(black_to(96)), folder)
    assert inverted.veil.mean == 0.25


def test_a_mask_that_is_gone_is_said_and_its_image_shown(tmp_path: Path) -> None:
    place, _ = masked(tmp_path, black_to(96), "masks")
    (place.root / "masks" / "one.png").unlink()
    (card,) = sheets(place).cards
    assert card.uri is not None
    assert card.veil.uri is None
    elsewhere = {"id": "a", "instance_data_dir": "a", "resolution": 128}  # no mask any more
    (unmasked,) = sheets(workspace(tmp_path, elsewhere)).cards
    assert unmasked.veil.problem == "its dataset's folder is out of reach"
    page = render("card.html.jinja", card=card, bucket="128x128")
    assert f"Mask not shown: {card.veil.problem}" in page
    assert str(tmp_path) not in page


def test_masks_count_towards_what_a_page_may_weigh(tmp_path: Path) -> None:
    place, card = masked(tmp_path, black_to(96), "masks")
    room = len(render("card.html.jinja", card=card, bucket="128x128").encode()) + len("data:")
    assert len(sheets(place, room=room).cards) == 1
    assert sheets(place, room=room - len(card.veil.uri)).cards == []


def many(tmp_path: Path, buckets: int = 3, each: int = 5) -> Any:
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
         "aspect_bucket_alignment": 16},
    )  # fmt: skip
    rows = [
        filed(place, "a", f"{b}-{n}.png", picture(100 * b + n, (64 + 32 * b, 64)))
        for b in range(buckets)
        for n in range(each)
    ]
    publish(place, rows)
    return place


def test_every_bucket_shows_as_many_as_are_asked_for_or_all(tmp_path: Path) -> None:
    place = many(tmp_path)
    for asked in (0, 3, 9):
        found = sheets(place, asked)
        assert [len(sheet.cards) for sheet in found.sheets] == [min(asked, 5)] * 3
        for sheet in found.sheets:
            assert {card.sample["geometry"]["bucket"] for card in sheet.cards} <= {sheet.bucket}


def test_the_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    place = many(tmp_path, each=9)

    def chosen(seed: int) -> list[str]:
        return [card.sample["path"] for card in sheets(place, 3, seed).cards]

    assert chosen(1) == chosen(1)
    assert len({tuple(chosen(seed)) for seed in range(5)}) > 1


def test_where_room_ends_no_bucket_has_two_cards_more_than_another(tmp_path: Path) -> None:
    place = many(tmp_path)
    whole = Album(ROOM)
    draw(place, reachable_roots(place), whole, 5, 0, Keys())
    found = sheets(place, 5, room=whole.used // 2)
    counts = [len(sheet.cards) for sheet in found.sheets]
    assert 0 < sum(counts) < 15
    assert found.refused == 15 - sum(counts)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("letter", ["a", "長", "🙂", '"'])
@pytest.mark.parametrize("there", [True, False])
def test_cards_weigh_no_more_than_their_room(tmp_path: Path, letter: str, there: bool) -> None:
    place = many(tmp_path)
    captions = [f"{n}{letter * 900}" for n in range(5)]
    publish(place, [{**row, "captions": captions} for row in place.images.read().to_pylist()])
    if not there:
        shutil.rmtree(tmp_path / "a")
    found, room = sheets(place, 5), Album(100_000)
    weights = [
        len(render("card.html.jinja", card=card, bucket="64x64").encode()) for card in found.cards
    ]
    assert len(weights) == 15
    part = draw(place, reachable_roots(place), room, 5, 0, Keys())
    shown = [render("card.html.jinja", card=card, bucket="64x64") for card in part.cards]
    assert sum(len(text.encode()) for text in shown) == pytest.approx(room.used, abs=15 * 8)
    assert room.used <= room.limit < room.used + 1.5 * max(weights) or len(shown) == 15
    assert len(shown) + part.refused == 15
    if letter != "a":
        assert part.refused > 0


def test_files_that_are_gone_changed_or_elsewhere_say_so(tmp_path: Path) -> None:
    place = many(tmp_path, buckets=1, each=2)
    (tmp_path / "a" / "0-0.png").unlink()
    (tmp_path / "a" / "0-1.png").write_bytes(b"other")
    rows = place.images.read().to_pylist()
    publish(place, [*rows, image("a", "../0-2.png")])
    problems = {card.sample["path"]: card.problem for card in sheets(place).cards}
    assert "No such file" in problems["0-0.png"]
    assert "has changed" in problems["0-1.png"]
    assert "out of the dataset's folder" in problems["../0-2.png"]


def test_only_the_largest_buckets_have_sheets(tmp_path: Path) -> None:
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
         "aspect_bucket_alignment": 16},
    )  # fmt: skip
    # One bucket for every width, and the last is the largest.
    sizes = [(64 + 16 * n, 64) for n in range(MOST_SHEETS + 3)]
    rows = [image("a", f"{w}.png", width=w, height=h) for w, h in sizes]
    rows.append(image("a", "again.png", width=sizes[-1][0], height=64))
    publish(place, rows)
    found = sheets(place, 1)
    assert (len(found.sheets), found.others) == (MOST_SHEETS, 3)
    assert found.sheets[0].samples == 2
