"""What is asked for: seeds, names, sizes, and a model's own settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from omnigen_pipe.prompts.template import DIFFUSERS_NEGATIVE_PROMPT
from omnigen_pipe.sampling.requests import (
    Settings,
    at_strengths,
    chosen_settings,
    exact,
    model_settings,
    parsed_size,
    readable_name,
    requests_of,
)

PROMPTS = st.text(max_size=80).filter(lambda text: "<|image_" not in text)


@given(
    prompts=st.lists(PROMPTS, max_size=5),
    library=st.dictionaries(st.text(max_size=20), PROMPTS, max_size=5),
    count=st.integers(1, 3),
)
def test_every_prompt_is_drawn_count_times_under_names_of_its_own(
    prompts: list[str], library: dict[str, str], count: int
) -> None:
    requests = requests_of(prompts, library, 7, count)
    texts = [*prompts, *library.values()]
    assert [r.prompt for r in requests] == [text for text in texts for _ in range(count)]
    assert [r.seed for r in requests] == [7 + i for _ in texts for i in range(count)]
    assert len({r.stem.casefold() for r in requests}) == len(requests)
    for request in requests:
        name = f"{request.stem}.png"
        assert len(name.encode()) < 256
        assert not set(name) & set('/\\:*?"<>|\0\n')
        assert not name.startswith((".", "-"))


def test_names_speak() -> None:
    assert readable_name("A red circle, on: black!") == "a-red-circle-on-black"
    assert readable_name("日本 naïve") == "日本-naïve"
    assert readable_name("../..") == "picture"
    long = readable_name("word " * 40)
    assert long.endswith("word")
    assert len(long) <= 60
    names = [r.name for r in requests_of(["a cat", "A cat!"], {"A Cat": "x", "kit/ten": "y"}, 0, 1)]
    assert names == ["a-cat", "a-cat-2", "A-Cat-3", "kit-ten"]


def test_prompts_with_input_images_are_refused() -> None:
    with pytest.raises(UsageError, match="input image"):
        requests_of(["like <img><|image_1|></img>"], {}, 0, 1)


@pytest.mark.parametrize("where", ["the options", "generation.json"])
def test_negative_prompts_with_input_images_are_refused(where: str) -> None:
    with pytest.raises(UsageError, match=f"{where}: negative_prompt: it asks for an input image"):
        Settings().changed({"negative_prompt": "<img><|image_1|></img>"}, where)


@given(strengths=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_every_strength_is_drawn_once(strengths: list[float]) -> None:
    requests = requests_of(["a", "b"], {}, 0, 2)
    drawn = at_strengths(requests, strengths)
    distinct = list(dict.fromkeys(strengths))
    assert len(set(drawn)) == len(drawn) == 4 * len(distinct)
    assert [(r.prompt, r.seed, r.strength) for r in drawn] == [
        (r.prompt, r.seed, strength) for strength in distinct for r in requests
    ]


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_again_as_they_were(number: float) -> None:
    assert float(exact(number)) == number
    assert not exact(number).endswith(".0")


def test_sizes() -> None:
    assert parsed_size("1024x768") == {"width": 1024, "height": 768}
    assert parsed_size("64X32") == {"width": 64, "height": 32}
    with pytest.raises(UsageError, match="The nearest is 1008x704"):
        parsed_size("1000x700")
    with pytest.raises(UsageError, match="The nearest is 16x16"):
        parsed_size("1x0")
    for text in ("", "64", "64*64", "-64x64", "64x64x64", "999999x16"):
        with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
            parsed_size(text)


def test_a_model_says_how_it_wants_to_be_used(tmp_path: Path) -> None:
    usual = model_settings(None)
    assert (usual.size, usual.num_inference_steps, usual.guidance_scale) == ("1024x1024", 50, 2.5)
    assert usual.negative_prompt == DIFFUSERS_NEGATIVE_PROMPT
    file = tmp_path / "generation.json"
    file.write_text(json.dumps({"width": 64, "guidance_scale": 3, "negative_prompt": ""}))
    own = model_settings(file)
    assert own == usual.model_copy(
        update={"width": 64, "guidance_scale": 3.0, "negative_prompt": ""}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be used"),
        ("[]", "not a JSON object"),
        ('{"width": 100}', "width: Input should be a multiple of 16"),
        ('{"steps": 3}', "steps: Extra inputs"),
        ('{"guidance_scale": NaN}', "guidance_scale"),
        ('{"num_inference_steps": "3"}', "num_inference_steps"),
    ],
)
def test_wrong_settings_of_a_model_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "generation.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        model_settings(file)
    assert str(file) in str(caught.value)


def test_changed_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="The options: guidance_scale"):
        Settings().changed({"guidance_scale": float("nan")}, "The options")


def test_an_argument_that_is_no_utf_8_is_refused() -> None:
    """Python hands such bytes over as halves of pairs, which no tokenizer takes."""
    with pytest.raises(UsageError, match=r"caf\\udce9. is no valid Unicode") as refused:
        requests_of(["caf\udce9"], {}, 0, 1)
    str(refused.value).encode()
    with pytest.raises(UsageError, match=r"negative_prompt: it is no valid Unicode") as refused:
        chosen_settings(Settings(), None, {"negative_prompt": "caf\udce9"})
    str(refused.value).encode()
