"""The page: whole, escaped, self-contained, and never over a file that is not its own."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import QUIET, filed, image, picture, publish, run, workspace
from PIL import Image

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.model_files import EMBEDDED_FOLDER
from omnigen_pipe.report import of_run, of_workspace
from omnigen_pipe.report.of_workspace import Options
from omnigen_pipe.report.page import MOST_BYTES, check_output, cut
from omnigen_pipe.report.sheets import MOST_SHEETS
from omnigen_pipe.workspace import Workspace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=1'>",
    '"><svg onload=window.pwned=1>',
    "' onmouseover='window.pwned=1",
    "{{ 7*7 }}{% include '/etc/passwd' %}",
    "a\0b\ud800c\u202ed",
)

#: Attributes by which a page may load something.
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}
#: All that the templates use.
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "nav"),
    *("ul", "li", "a", "main", "section", "dl", "div", "dt", "dd", "table", "caption", "thead"),
    *("tbody", "tr", "th", "td", "details", "summary", "strong", "span", "code", "figure"),
    *("figcaption", "img", "label", "input", "select", "option", "output", "footer", "script"),
    *("noscript", "svg", "path", "line", "br"),
}


class Read(HTMLParser):
    """What a page holds: tags, loaded addresses, event handlers and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in LOADING:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def options() -> Options:
    return Options(decoded=0)


def made(tmp_path: Path) -> Workspace:
    """Hostile captions and names, an eval split with leaks, and images that are left out."""
    place = workspace(
        tmp_path / "<b>hostile",
        {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
         "minimum_image_size": 50, "aspect_bucket_alignment": 16},
        {"id": "held", "instance_data_dir": "held", "resolution": 64, "dataset_type": "eval",
         "resolution_type": "pixel", "aspect_bucket_alignment": 16},
    )  # fmt: skip
    rows = [
        filed(place, "a", f"<i>{n}</i>.png", picture(n, (64 + 32 * (n % 2), 64)),
              captions=[text.encode("utf-8", "replace").decode(), ""])
        for n, text in enumerate(HOSTILE)
    ]  # fmt: skip
    rows.append(filed(place, "a", "twin.png", picture(0, (64, 64)), captions=["twin"]))
    rows.append(filed(place, "held", "twin.png", picture(0, (64, 64)), captions=["twin"]))
    smaller = picture(1, (96, 64)).resize((90, 60)).resize((96, 64))
    rows.append(filed(place, "held", "near.png", smaller, captions=["near"]))
    rows.append(image("a", "small.png", width=20, height=20))
    rows.append(image("a", "<u>bad</u>.png", status="rejected", reason="<s>bad</s>: " + "x" * 9999))
    publish(place, rows)
    return place


def pages(tmp_path: Path) -> dict[str, str]:
    place = made(tmp_path)
    of_workspace.write(place, QUIET, options())
    folder = run(place, "one", 30, {"<b>cat<": [0, 10, 20], "dog": [10, 20]}, HOSTILE[0], 3)
    of_run.write(place, QUIET, "one")
    files = {"workspace": place.root / "inspect.html", "run": folder / "inspect.html"}
    return {name: path.read_text("utf-8") for name, path in files.items()}


def test_pages_load_nothing_and_what_is_hostile_stays_text(tmp_path: Path) -> None:
    for name, page in pages(tmp_path).items():
        read = Read(page)
        assert set(read.tags) <= TAGS, name
        assert all(re.match(r"data:image/(png|jpeg);base64,|#", a) for a in read.addresses), name
        assert read.tags.count("script") == 1
        assert read.handlers == []
        assert not re.search(r"url\(|@import", page)
        assert "default-src 'none'" in page
        assert HOSTILE[0] in read.text
        if name == "workspace":
            assert "{{ 7*7 }}{% include" in read.text


def test_no_page_says_where_the_workspace_lies(tmp_path: Path) -> None:
    place = made(tmp_path)
    for path in (place.root / "a").glob("*.png"):
        path.unlink()
    of_workspace.write(place, QUIET, options())
    page = (place.root / "inspect.html").read_text("utf-8")
    assert "No such file" in page
    assert str(tmp_path) not in page
    folder = run(place, "one", 3, {"dog": [1]})
    (folder / "validation" / "step-000001" / "dog.png").write_bytes(b"no picture")
    of_run.write(place, QUIET, "one")
    page = (folder / "inspect.html").read_text("utf-8")
    assert "cannot be read as PNG" in page
    assert "CLIP score" in page
    assert str(tmp_path) not in page


def test_a_page_is_a_page_to_those_who_cannot_see_it(tmp_path: Path) -> None:
    for page in pages(tmp_path).values():
        assert page.count("<h1>") == 1
        assert 'lang="en"' in page
        for tag in re.findall(r"<img [^>]*>", page):
            assert re.search(r'alt="[^"]', tag), tag
        for tag in re.findall(r"<th\b[^>]*>", page):
            assert "scope=" in tag, tag
        for tag in re.findall(r"<svg [^>]*>", page):
            assert 'aria-label="' in tag, tag


def test_the_totals_of_the_page_are_those_of_the_manifest(tmp_path: Path) -> None:
    place = made(tmp_path)
    summary = of_workspace.write(place, QUIET, options())
    page = (place.root / "inspect.html").read_text("utf-8")
    shown = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(r"<dt>([\w ]+)</dt><dd>([\d,]+)</dd>", page)
    }
    assert shown["found"] == place.images.read().num_rows == 11
    assert shown["found"] == shown["used"] + shown["filtered by an option"] + shown["rejected"]
    assert (shown["used"], shown["filtered by an option"], shown["rejected"]) == (9, 1, 1)
    assert summary.counts["images"] == shown["found"]
    assert summary.details["empty_captions"] == 6


def test_copies_and_leaks_are_told(tmp_path: Path) -> None:
    summary = of_workspace.write(made(tmp_path), QUIET, options())
    copies = summary.details["duplicates"]
    (same,), (near,) = (copies[kind].pop("leaking_groups") for kind in ("same_bytes", "look_alike"))
    assert copies["same_bytes"] == {"groups": 1, "surplus": 2, "leaking": 1}
    assert copies["look_alike"] == {"groups": 1, "surplus": 1, "leaking": 1}
    assert [f"{file['dataset']}: {file['path']}" for file in same] == [
        "held: twin.png", "a: <i>0</i>.png", "a: twin.png",
    ]  # fmt: skip
    assert [file["split"] for file in near] == ["eval", "train"]
    text = Read(Path(summary.details["output"]).read_text("utf-8")).text
    for told in (
        "1 evaluated image is trained on as well.",
        "1 evaluated image looks like one that is trained on.",
    ):
        assert told in summary.notes
        assert told in text


def test_the_report_compares_no_more_images_than_it_may(tmp_path: Path) -> None:
    place = made(tmp_path)
    of_workspace.write(place, QUIET, Options(decoded=0, hash_limit=0))
    page = Read((place.root / "inspect.html").read_text("utf-8"))
    assert "Not looked for" in page.text
    for limit in (1, 2, 5):
        summary = of_workspace.write(place, QUIET, Options(decoded=0, hash_limit=limit))
        assert summary.counts["images compared"] == limit
        page = Read((place.root / "inspect.html").read_text("utf-8"))
        assert f"{limit} of 7 different images" in page.text


# Stages of completeness.
def test_without_discover_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(PipeError, match="run `omnigen-pipe discover` first"):
        of_workspace.write(workspace(tmp_path), QUIET, options())


def test_after_discover_alone_there_is_a_page(tmp_path: Path) -> None:
    place = workspace(tmp_path, {"id": "a", "instance_data_dir": "a"})
    rows = [filed(place, "a", "1.png", picture(1, (64, 64))), image("a", "2", status="rejected")]
    publish(place, rows, bucketed=False)
    summary = of_workspace.write(place, QUIET, options())
    counts = summary.counts
    assert (counts["images"], counts["waiting"], counts["rejected"]) == (2, 1, 1)
    text = Read((tmp_path / "inspect.html").read_text("utf-8")).text
    assert text.count("omnigen-pipe bucket") >= 4
    assert "not judged yet" in text


def test_without_an_image_there_is_a_page(tmp_path: Path) -> None:
    place = workspace(tmp_path, {"id": "a", "instance_data_dir": "a"})
    publish(place, [])
    assert of_workspace.write(place, QUIET, Options()).counts["images"] == 0
    text = Read((tmp_path / "inspect.html").read_text("utf-8")).text
    assert "No image is used." in text


def test_without_latents_or_an_eval_split_the_page_says_so(tmp_path: Path) -> None:
    place = workspace(tmp_path, {"id": "a", "instance_data_dir": "a", "resolution": 64,
                                 "resolution_type": "pixel"})  # fmt: skip
    publish(place, [filed(place, "a", "1.png", picture(1, (64, 64)))])
    summary = of_workspace.write(place, QUIET, Options())
    text = Read((tmp_path / "inspect.html").read_text("utf-8")).text
    assert summary.details["psnr_db"] is None
    assert "run `omnigen-pipe encode-vae`" in text
    assert "No image is evaluated on" in text


def _with_model(tmp_path: Path) -> tuple[Workspace, Path]:
    """A workspace with one image, and the folder of its own copy of the embedded model."""
    dataset = {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel"}
    place = workspace(tmp_path / "here", dataset)
    folder = tmp_path / "models" / "mine"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    model = {"pretrained_model_name_or_path": str(folder)}
    place = Workspace(place.root, parse({"model": model, "dataset": [dataset]}, "test"))
    publish(place, [filed(place, "a", "1.png", picture(1, (64, 64)))])
    return place, folder


@pytest.mark.parametrize("gone", [".", "vae", "tokenizer", "vae/config.json", "tokenizer/*"])
@pytest.mark.parametrize("decoded", [0, 2])
def test_a_model_that_is_not_there_or_half_is_a_note(
    tmp_path: Path, gone: str, decoded: int
) -> None:
    place, folder = _with_model(tmp_path)
    found = [folder] if gone == "." else list(folder.glob(gone))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    summary = of_workspace.write(place, QUIET, Options(decoded=decoded))
    page = (place.root / "inspect.html").read_text("utf-8")
    lost = [
        what
        for what, part in (("latents", "vae"), ("tokens", "tokenizer"))
        if gone == "." or gone.startswith(part)
    ]
    told = [note for note in summary.notes if "nothing is known" in note]
    assert [note.split()[1] for note in told] == lost
    for note in told:
        assert note in html.unescape(page)
    assert ("VAE cannot be used" in html.unescape(page)) == ("latents" in lost and decoded > 0)
    assert str(tmp_path) not in page
    assert "mine" in page


def test_without_contact_sheets_the_page_says_why(tmp_path: Path) -> None:
    place, _ = _with_model(tmp_path)
    of_workspace.write(place, QUIET, Options(samples=0))
    text = Read((place.root / "inspect.html").read_text("utf-8")).text
    assert "Left out with --samples 0." in text
    assert "decoded, and --samples 0 leaves them out" in text
    assert "No image is used." not in text
    assert "shown above" not in text


def test_a_run_without_steps_or_pictures_has_a_page(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    folder = place.run_folder("new")
    folder.mkdir(parents=True)
    summary = of_run.write(place, QUIET, "new")
    assert summary.counts["steps"] == 0
    text = Read((folder / "inspect.html").read_text("utf-8")).text
    assert "No step has been trained yet" in text
    assert "validation_step_interval" in text
    assert "run.json is not there" in text


def test_a_run_with_numbers_that_are_none_has_a_page(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    folder = run(place, "one", 6_001, {}, evaluations=3)
    steady = [{"step": n + 1, "learning_rate": 1e-4, "loss": math.nan} for n in range(6_001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steady))
    rows = [
        {"step": 0, "loss": None, "baseline": [1.0, None], "ema": None},
        {"step": 1, "loss": 0.5, "baseline": None, "ema": {"loss": None}},
        {"step": 2, "loss": math.inf, "baseline": 3, "ema": {"loss": 0.25}},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"settings": {"loss_limit": math.inf, "seed": math.nan}}
    (folder / "run.json").write_text(json.dumps(start))
    assert of_run.write(place, QUIET, "one").counts["steps"] == 6_001
    text = Read((folder / "inspect.html").read_text("utf-8")).text
    for told in ("Learning rate", "loss of the average", "loss_limit"):
        assert told in text


@pytest.mark.parametrize("name", ["other", "../runs/one", "..", ".", "one/checkpoints", ""])
def test_a_run_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    place = workspace(tmp_path)
    (place.run_folder("one") / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="there are: one"):
        of_run.write(place, QUIET, name)


# The file.
def test_the_templates_are_part_of_the_package() -> None:
    root = Path(of_run.__file__).resolve().parents[2]
    configuration = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    patterns = configuration["tool"]["setuptools"]["package-data"]["omnigen_pipe"]
    shipped = {path for one in patterns for path in (root / "omnigen_pipe").glob(one)}
    there = set((root / "omnigen_pipe" / "report" / "templates").iterdir())
    assert len(there) >= 5
    assert there <= shipped


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    place = made(tmp_path)
    first = of_workspace.write(place, QUIET, options())
    again = of_workspace.write(place, QUIET, options())
    assert first.counts == again.counts
    output = tmp_path / "mine.html"
    output.write_text("<!doctype html>my own page")
    with pytest.raises(UsageError, match="--overwrite"):
        of_workspace.write(place, QUIET, options(), output)
    assert output.read_text() == "<!doctype html>my own page"
    of_workspace.write(place, QUIET, options(), output, overwrite=True)
    assert "omnigen-pipe inspect" in output.read_text("utf-8")
    assert list((place.root / "staging").iterdir()) == []


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="there is no folder"):
        check_output(tmp_path / "no" / "page.html", overwrite=True)


@given(st.text(max_size=50), st.integers(3, 20))
def test_cutting_keeps_both_ends(text: str, most: int) -> None:
    found = cut(text, most)
    assert len(found) <= most
    found.encode("utf-8")
    if len(text) > most and "\0" not in text and text.isascii():
        assert text.startswith(found.split("…")[0])
        assert text.endswith(found.split("…")[-1])


def heavy(tmp_path: Path) -> Any:
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 256, "resolution_type": "pixel",
         "aspect_bucket_alignment": 16, "upscale": True},
    )  # fmt: skip
    noise = Image.effect_noise((256, 256), 90)
    rows = []
    for number in range(400):
        turned = noise.rotate(number).resize((256 + 32 * (number % 12), 256)).convert("RGB")
        texts = ["long " * 2000, *(f"{number} and {n}" for n in range(30))]
        rows.append(filed(place, "a", f"{'x' * 100}/{number}.png", turned, captions=texts))
    publish(place, rows)
    return place


def test_long_captions_without_a_picture_keep_the_page_within_its_bound(tmp_path: Path) -> None:
    """Each letter takes five bytes in the page, and each card shows several captions."""
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
         "aspect_bucket_alignment": 16},
    )  # fmt: skip
    texts = [f"{n}" + '"' * 900 for n in range(5)]
    publish(place, [
        image("a", f"{width}/{n}{'&' * 150}.png", width=width, captions=texts)
        for width in range(64, 64 + 16 * MOST_SHEETS, 16)
        for n in range(40)
    ])  # fmt: skip
    summary = of_workspace.write(place, QUIET, Options(samples=40, decoded=0, hash_limit=0))
    assert summary.counts["bytes written"] < MOST_BYTES
    assert any("found no room" in note for note in summary.notes)


@pytest.mark.slow
def test_no_page_is_heavier_than_its_bound(tmp_path: Path) -> None:
    place = heavy(tmp_path)
    summary = of_workspace.write(place, QUIET, Options(samples=40, decoded=0))
    assert MOST_BYTES / 2 < summary.counts["bytes written"] < MOST_BYTES
