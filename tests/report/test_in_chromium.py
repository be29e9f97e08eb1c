"""The pages in a browser: they open, fit a phone, work, and ask the network nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, executable
from made import QUIET, run
from test_page import HOSTILE, made

from omnigen_pipe.report import of_run, of_workspace
from omnigen_pipe.report.of_workspace import Options


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = executable()
    if program is None:
        pytest.skip("there is no Chromium to open the pages in")
    with browser(program) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = made(tmp_path_factory.mktemp("pages"))
    of_workspace.write(place, QUIET, Options(decoded=0))
    pictures = {HOSTILE[1].replace("/", ""): [0, 10, 20], "dog": [10, 20], "x" * 100: [20]}
    folder = run(place, "one", 300, pictures, HOSTILE[0], 3)
    of_run.write(place, QUIET, "one")
    return {"workspace": place.root / "inspect.html", "run": folder / "inspect.html"}


@pytest.mark.parametrize("name", ["workspace", "run"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_asks_for_nothing_and_says_nothing(
    page: Page, files: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    page.open(files[name], width, scheme=scheme)
    page.asks("for (const d of document.querySelectorAll('details')) d.open = true; 0")
    assert page.asks("document.documentElement.scrollWidth") <= width
    assert page.requests() == [files[name].as_uri()]
    assert page.complaints() == []
    assert page.asks("typeof window.pwned") == "undefined"
    broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
    assert page.asks(broken) == 0


def test_what_a_page_asks_for_would_be_seen(page: Page, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    asking = tmp_path / "asking.html"
    asking.write_text("<img src='http://127.0.0.1:9/seen.png'><script>nonsense()</script>")
    page.open(asking, 360)
    assert page.requests() == [asking.as_uri(), "http://127.0.0.1:9/seen.png"]
    assert any("nonsense" in complaint for complaint in page.complaints())


#: The contrast (WCAG 2.1) of text on the nearest background, the least of all that is shown.
CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const bright = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let least = 21;
  for (const one of document.querySelectorAll("p, td, th, a, summary, dt, dd, figcaption, .tick")) {
    let behind = one, colour;
    do {
      colour = rgb(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    } while (behind && colour.length === 4 && colour[3] === 0);
    const pair = [bright(rgb(getComputedStyle(one).color)), bright(colour)].sort((a, b) => b - a);
    least = Math.min(least, (pair[0] + 0.05) / (pair[1] + 0.05));
  }
  return least;
})()
"""


@pytest.mark.parametrize("name", ["workspace", "run"])
def test_light_and_dark_differ_and_both_can_be_read(
    page: Page, files: dict[str, Path], name: str
) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.open(files[name], 360, scheme=scheme)
        grounds.append(page.asks("getComputedStyle(document.body).backgroundColor"))
        assert page.asks(CONTRAST) >= 4.5
    assert grounds[0] != grounds[1]


SHOWN = """
[...document.querySelectorAll("[data-slides]")].map((figure) =>
  [...figure.querySelectorAll("[data-step]")].filter((f) => f.offsetParent !== null)
    .map((f) => Number(f.dataset.step)))
"""


def move(page: Page, slider: int, place: int) -> None:
    page.asks(
        f"(() => {{ const input = document.querySelectorAll('input[type=range]')[{slider}];"
        f"input.value = {place}; input.dispatchEvent(new Event('input')); }})()"
    )


def test_a_slider_shows_one_step_and_moves_the_others(page: Page, files: dict[str, Path]) -> None:
    page.open(files["run"], 1280)
    assert page.asks(SHOWN) == [[20], [20], [20]]
    move(page, 0, 0)
    assert page.asks(SHOWN) == [[0], [10], [20]]
    page.asks("document.getElementById('together').click()")
    move(page, 0, 1)
    move(page, 1, 1)
    assert page.asks(SHOWN) == [[10], [20], [20]]
    text = "document.querySelector('[data-slides] output').textContent"
    assert page.asks(text) == "after step 10"


def test_the_filter_leaves_the_cards_that_have_the_text(page: Page, files: dict[str, Path]) -> None:
    page.open(files["workspace"], 1280)
    cards = "[...document.querySelectorAll('[data-text]')].filter(c => c.offsetParent).length"
    everything = page.asks(cards)
    page.asks(
        "(() => { const f = document.getElementById('filter-text'); f.value = 'ONERROR';"
        "f.dispatchEvent(new Event('input')); })()"
    )
    assert page.asks(cards) == 1
    assert page.asks("document.getElementById('filter-shown').textContent") == (
        f"1 of {everything} shown"
    )
    page.asks(
        "(() => { const f = document.getElementById('filter-text'); f.value = '';"
        "f.dispatchEvent(new Event('input'));"
        "const b = document.getElementById('filter-bucket'); b.value = '96x64';"
        "b.dispatchEvent(new Event('change')); })()"
    )
    wide = page.asks("document.querySelectorAll('[data-bucket=\"96x64\"]').length")
    assert page.asks(cards) == wide < everything
